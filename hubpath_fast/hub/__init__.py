"""The hub: pre-trained models by name, made ready to be experts.

Importing it imports neither timm nor torchvision: a name imports the library it needs.
"""

from __future__ import annotations

from ..model.heads import head_parameters, split_parameters
from .build import build_experts, default_input_size, normalization
from .checkpoint import read_state_dict
from .create import create_model
from .errors import HubError
from .expert import Expert, Resized, RunningStatistics, load_body
from .labels import expert_names, expert_sources
from .names import list_models
from .spec import HUBS, ExpertSpec, expand_names

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
    "expert_names",
    "expert_sources",
    "head_parameters",
    "list_models",
    "load_body",
    "normalization",
    "read_state_dict",
    "split_parameters",
]
