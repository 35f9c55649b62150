"""A photograph of a face, from its file to pixels: one way for training, caches and ``predict``."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ...data.decode import load_image, why_broken
from ...data.later import Later

io = Later("torchvision.io")
DEPRECATED = re.compile("The image decoding and encoding capabilities", re.IGNORECASE)
TURNED = (5, 6, 7, 8)  # EXIF's orientations in which width and height change places
JPEG_END = b"\xff\xd9"
TAIL = 1024  # bytes at a file's end in which a whole JPEG says so, but for what tools add


class Look(NamedTuple):
    """A photograph by its head. size: (width, height) as it is stored. orientation: EXIF's, 1 where
    there is none. fault: why it cannot be read, and then nothing else is known."""

    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    fault: str | None = None

    def shown_size(self, upright: bool) -> tuple[int, int]:
        """(width, height) of what is read."""
        return self.size[::-1] if upright and self.orientation in TURNED else self.size


def read_face_image(path: str | Path, upright: bool) -> Tensor:
    """uint8 [3, H, W] of an image file, by ``load_image``'s rules.

    upright: turned as EXIF says, as photographs of one's own are; False: the pixels as they are
    stored, which the coordinates of published sets mean. JPEGs in grey or RGB that need no turn are
    decoded by torchvision, which takes half of the time.

    Raises DataError, with the path, for a file that is broken, missing or no image.
    """
    try:
        with Image.open(path) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            plain = plain and not (upright and _orientation(image) != 1)
    except Exception:  # ``load_image`` says what it is
        plain = False
    pixels = _decode_jpeg(path) if plain else None
    if pixels is None:
        image = np.array(load_image(path, upright=upright))
        pixels = torch.from_numpy(image).permute(2, 0, 1)
    return pixels


def _decode_jpeg(path: str | Path) -> Tensor | None:
    """uint8 [3, H, W]; None of a broken one, and where this torchvision has no decoder."""
    # As ``decode._hush`` does, and for its reason: 0.29 warns at each image that a later release
    # will have none, where Pillow's takes over.
    if ("ignore", DEPRECATED, DeprecationWarning, None, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", DEPRECATED.pattern, DeprecationWarning)
    try:
        data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        return io.decode_jpeg(data, mode=io.ImageReadMode.RGB)
    except (AttributeError, ImportError, OSError, RuntimeError):
        return None


def look(path: Path, decode: bool = False) -> Look:
    """What a photograph is, or why it cannot be read. A JPEG that does not end as one is decoded:
    it may have been cut short. decode: whatever it is."""
    fault = why_broken(path, decode or _is_cut(path))
    if fault is not None:
        return Look(fault=fault)
    try:
        with Image.open(path) as image:
            return Look(image.size, _orientation(image))
    except Exception as error:  # gone meanwhile
        return Look(fault=f"{path} ({error})")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of damaged EXIF, which says nothing of the pixels
        return 1
    return value if value in range(1, 9) else 1


def _is_cut(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"\xff\xd8":
                return False
            end = file.seek(0, 2)
            file.seek(max(end - TAIL, 0))
            return JPEG_END not in file.read()
    except OSError:
        return False
