"""Data: in-memory sets and image folders, and the stateless streams that training reads."""

from __future__ import annotations

from .digits import RENDERINGS, DigitsTask, write_image_folder
from .folder import ImageSplit, ImageSplits, load_image, open_images
from .images import EvalBatches, ImageDataset, TrainStream
from .layouts import DataError
from .order import SampleOrder
from .tensors import TensorBatches, TensorSet, TensorStream
from .transforms import eval_transform, train_transform

__all__ = [
    "RENDERINGS",
    "DataError",
    "DigitsTask",
    "EvalBatches",
    "ImageDataset",
    "ImageSplit",
    "ImageSplits",
    "SampleOrder",
    "TensorBatches",
    "TensorSet",
    "TensorStream",
    "TrainStream",
    "eval_transform",
    "load_image",
    "open_images",
    "train_transform",
    "write_image_folder",
]
