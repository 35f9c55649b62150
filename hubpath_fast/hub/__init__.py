"""The hub: pre-trained models by name, made ready to be experts.

Names are loaded as they are asked for: listing models must not cost the seconds that importing timm
and torchvision takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model.heads import head_parameters, split_parameters
    from .build import build_experts, default_input_size, normalization
    from .create import create_model
    from .errors import HubError
    from .expert import Expert, Resized, RunningStatistics, load_body
    from .names import list_models
    from .spec import HUBS, ExpertSpec, expand_names
    from .weights import read_state_dict

MODULES = {
    "HUBS": ".spec",
    "Expert": ".expert",
    "ExpertSpec": ".spec",
    "HubError": ".errors",
    "Resized": ".expert",
    "RunningStatistics": ".expert",
    "build_experts": ".build",
    "create_model": ".create",
    "default_input_size": ".build",
    "expand_names": ".spec",
    "head_parameters": "..model.heads",
    "list_models": ".names",
    "load_body": ".expert",
    "normalization": ".build",
    "read_state_dict": ".weights",
    "split_parameters": "..model.heads",
}

__all__ = [
    "HUBS",
    "Expert",
    "ExpertSpec",
    "HubError",
    "Resized",
    "RunningStatistics",
    "build_experts",
    "create_model",
    "default_input_size",
    "expand_names",
    "head_parameters",
    "list_models",
    "load_body",
    "normalization",
    "read_state_dict",
    "split_parameters",
]


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name], __name__), name)
