"""What an expert of a hub was made from, as the model that has it keeps it."""

from __future__ import annotations

import dataclasses
import json

from torch import nn

from ..model.origin import ExpertOrigin
from .expert import Expert


def expert_origin(expert: Expert, input_size: int) -> ExpertOrigin:
    """input_size: the hub's, which a network's own size is told from."""
    spec, module = expert.spec, type(expert.body).__name__
    if spec is None or isinstance(spec.name, nn.Module):
        return ExpertOrigin(None, expert.label or module, module)
    if spec.size is None and expert.size != input_size:
        spec = dataclasses.replace(spec, size=expert.size)
    said = "" if expert.model is None else expert.model.config
    config = json.dumps(json.loads(said)) if said else None  # one form, however it was laid out
    return ExpertOrigin(str(spec), expert.label or expert.name, module, config)
