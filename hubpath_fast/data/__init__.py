"""Data: in-memory sets and image folders, and the stateless streams that training reads."""

from __future__ import annotations

from .digits import RENDERINGS, DigitsTask, write_image_folder
from .order import SampleOrder
from .tensors import TensorBatches, TensorSet, TensorStream

__all__ = [
    "RENDERINGS",
    "DigitsTask",
    "SampleOrder",
    "TensorBatches",
    "TensorSet",
    "TensorStream",
    "write_image_folder",
]
