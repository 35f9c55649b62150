"""The hub: pre-trained models by name, made ready to be experts."""

from __future__ import annotations

from .build import build_experts, default_input_size, normalization
from .create import create_model
from .errors import HubError
from .expert import Expert, Resized, head_parameters, load_body, split_parameters
from .weights import read_state_dict

__all__ = [
    "Expert",
    "HubError",
    "Resized",
    "build_experts",
    "create_model",
    "default_input_size",
    "head_parameters",
    "load_body",
    "normalization",
    "read_state_dict",
    "split_parameters",
]
