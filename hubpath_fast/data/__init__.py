"""Data: in-memory sets, image folders and named sets, and the stateless streams over them."""

from __future__ import annotations

from .augment import RandomCrops
from .cache import CACHES, cache_splits
from .check import CheckReport, check_dataset
from .crops import SummedCrops
from .decode import load_image
from .digits import RENDERINGS, DigitsTask, write_image_folder
from .folder import open_images
from .images import EvalBatches, ImageDataset, TrainStream
from .layouts import DataError
from .mixup import Mixing
from .named import DATASETS, open_dataset
from .order import SampleOrder
from .splits import ArraySplit, ImageSplit, ImageSplits
from .tensors import TensorBatches, TensorSet, TensorStream
from .transforms import eval_transform, square_transform, train_transform

__all__ = [
    "CACHES",
    "DATASETS",
    "RENDERINGS",
    "ArraySplit",
    "CheckReport",
    "DataError",
    "DigitsTask",
    "EvalBatches",
    "ImageDataset",
    "ImageSplit",
    "ImageSplits",
    "Mixing",
    "RandomCrops",
    "SampleOrder",
    "SummedCrops",
    "TensorBatches",
    "TensorSet",
    "TensorStream",
    "TrainStream",
    "cache_splits",
    "check_dataset",
    "eval_transform",
    "load_image",
    "open_dataset",
    "open_images",
    "square_transform",
    "train_transform",
    "write_image_folder",
]
