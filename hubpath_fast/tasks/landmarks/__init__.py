"""Landmarks: points of a face, or of anything, found as the maxima of maps (section 4.2)."""

from .digits import DIGITS_LAYOUT, LandmarkDigits
from .faces import Face, FaceAugment, FaceDataset, FaceSplit, FaceSplits
from .geometry import box_of_points, crop_matrix, flip_points, invert, transform_points, warp
from .head import HeatmapHead, attach_heatmap_head
from .layouts import FACES, LAYOUTS, LandmarkLayout, find_layout, flip_of_pairs
from .loss import map_loss
from .maps import decode, gaussian_targets
from .metrics import auc, failure_rate, nme, normalizer
from .read import read_landmarks
from .sets import open_faces

__all__ = [
    "DIGITS_LAYOUT",
    "FACES",
    "LAYOUTS",
    "Face",
    "FaceAugment",
    "FaceDataset",
    "FaceSplit",
    "FaceSplits",
    "HeatmapHead",
    "LandmarkDigits",
    "LandmarkLayout",
    "attach_heatmap_head",
    "auc",
    "box_of_points",
    "crop_matrix",
    "decode",
    "failure_rate",
    "find_layout",
    "flip_of_pairs",
    "flip_points",
    "gaussian_targets",
    "invert",
    "map_loss",
    "nme",
    "normalizer",
    "open_faces",
    "read_landmarks",
    "transform_points",
    "warp",
]
