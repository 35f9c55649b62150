"""COFW's files: images and landmarks in one .mat, of MATLAB 7.3 (HDF5) as published, or an older.

``IsTr`` (``IsT`` for test): n images, each a reference to an array that is stored transposed, [3,
w, h], or grey [w, h]. ``phisTr``: [87, n] in the file, of each face 29 x, 29 y and 29 flags that
are 1 where a landmark is occluded. Numbers are 1-based. The file's own boxes are not used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.layouts import DataError
from .rows import Listing, Row

KEYS = {"train": ("IsTr", "phisTr"), "test": ("IsT", "phisT")}
POINTS = 29
VALUES = 3 * POINTS
HDF5 = b"\x89HDF\r\n\x1a\n"
OLD = b"MATLAB 5.0 MAT-file"
HDF5_PLACES = (0, 512)  # MATLAB writes a text of 512 bytes before it
COMMAND = 'pip install "hubpath_fast[landmarks]"'


@dataclass(frozen=True)
class MatImage:
    """Image ``index`` (from 0) of the cell ``key`` of a file."""

    file: Path
    key: str
    index: int

    def read(self) -> Tensor:
        """uint8 [3, H, W], grey repeated; DataError, with file and face, if it is broken."""
        try:
            stored = self._stored()
            if stored.dtype != np.uint8 or not _is_image(stored.shape):
                raise ValueError(f"{stored.dtype} {list(stored.shape)}")
        except DataError:
            raise
        except Exception as error:  # HDF5's, zlib's and scipy's own kinds
            raise DataError(
                f"{self.file}:{self.index + 1}: the image cannot be read ({error}), expected "
                "bytes, grey or in three colours"
            ) from error
        pixels = torch.from_numpy(np.ascontiguousarray(stored))
        return (pixels.expand(3, *pixels.shape) if pixels.dim() == 2 else pixels).contiguous()

    def shape(self) -> tuple[int, int]:
        """(width, height), of the newer files without reading pixels."""
        if not is_hdf5(self.file):
            height, width = self._stored().shape[-2:]
            return width, height
        with open_hdf5(self.file) as file:
            return tuple(file[file[self.key][()].flat[self.index]].shape[-2:])

    def _stored(self) -> np.ndarray:
        """[H, W] or [3, H, W]."""
        if not is_hdf5(self.file):
            pixels = _old_values(self.file, _stamp(self.file))[self.key].flat[self.index]
            return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
        with open_hdf5(self.file) as file:
            pixels = file[file[self.key][()].flat[self.index]][()]
            return np.swapaxes(pixels, -1, -2)


def is_hdf5(file: Path) -> bool:
    return kind_of(file) == "hdf5"


def kind_of(file: Path) -> str | None:
    """ "hdf5", "old" (a .mat before 7.3) or None, by the file's first bytes. Raises OSError."""
    with open(file, "rb") as stream:
        head = stream.read(HDF5_PLACES[-1] + len(HDF5))
    if any(head[place : place + len(HDF5)] == HDF5 for place in HDF5_PLACES):
        return "hdf5"
    return "old" if head.startswith(OLD) else None


def open_hdf5(file: Path) -> Any:
    """Raises DataError, with the command that installs it, where h5py is missing."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"{file} is a MATLAB 7.3 file, which h5py reads, and h5py is not installed: {COMMAND}"
        ) from error
    return h5py.File(file, "r")


def read_cofw(file: Path, part: str | None = None) -> Listing:
    """The faces of a file; ``line`` is the face's number, from 1.

    part: "train" or "test"; None: whichever is there. Raises DataError where h5py is missing.
    """
    listing = Listing(file)
    wanted = "or ".join(f"{', '.join(KEYS[p])} ({p}) " for p in ([part] if part else KEYS)).strip()
    expected = f"expected COFW's .mat with the keys {wanted}"
    try:
        kind = kind_of(file)
        if kind is None:
            listing.add(None, f"no .mat file of MATLAB 5 to 7.3 by its first bytes, {expected}")
            return listing
        keys, values = (_read_new if kind == "hdf5" else _read_old)(file, part)
    except DataError:
        raise
    except Exception as error:
        what = f"damaged, cut short or of another version ({_first_line(error)})"
        listing.add(None, f"{what}, {expected}")
        return listing
    if values is None:
        listing.add(None, f"the keys found are {', '.join(sorted(keys)) or 'none'}, {expected}")
        return listing
    name, phis, images = values
    if phis.ndim != 2 or phis.shape[1] != VALUES or len(phis) != len(images):
        listing.add(
            None,
            f"{KEYS[name][1]} has {' x '.join(map(str, phis.shape))} values for {len(images)} "
            f"images, expected {VALUES} for each: {POINTS} x, {POINTS} y, {POINTS} occlusion flags",
        )
        return listing
    listing.rows = list(_rows(listing, name, phis, images))
    return listing


def _rows(listing: Listing, name: str, phis: np.ndarray, images: list):
    for i, (values, fault) in enumerate(zip(phis, images, strict=True)):
        if fault is not None:
            listing.add(i + 1, f"its image is {fault}, expected bytes, [h, w] or [h, w, 3]")
        elif not np.isfinite(values).all():
            listing.add(i + 1, "a coordinate is not finite, expected finite numbers such as 103.5")
        else:
            numbers = torch.from_numpy(values.astype(np.float64))
            yield Row(
                i + 1,
                f"{listing.file.name}#{i + 1}",
                numbers[: 2 * POINTS].view(2, POINTS).T.contiguous(),
                occluded=numbers[2 * POINTS :] != 0,
                source=MatImage(listing.file, KEYS[name][0], i),
            )


# Both return (the keys that are there, None or (part, values [n, 87], of each image its fault)).


def _read_new(file: Path, part: str | None) -> tuple[list[str], tuple | None]:
    with open_hdf5(file) as data:
        keys = [key for key in data if not key.startswith("#")]
        name = _part(keys, part)
        if name is None:
            return keys, None
        images, phis = (data[key][()] for key in KEYS[name])
        _check_cell(KEYS[name][0], images)
        return keys, (name, phis.T, [_fault(data[reference]) for reference in images.flat])


def _read_old(file: Path, part: str | None) -> tuple[list[str], tuple | None]:
    values = _old_values(file, _stamp(file))
    keys = [key for key in values if not key.startswith("__")]
    name = _part(keys, part)
    if name is None:
        return keys, None
    images, phis = (values[key] for key in KEYS[name])
    _check_cell(KEYS[name][0], images)
    faults = [_fault(pixels, lambda shape: (*shape[2:], *shape[:2])) for pixels in images.flat]
    return keys, (name, phis, faults)


def _check_cell(key: str, images: np.ndarray) -> None:
    if images.dtype != object:
        raise ValueError(f"{key} is {images.dtype} {list(images.shape)}, no cell of images")


def _fault(pixels: Any, colours_first: Callable[[tuple], tuple] = tuple) -> str | None:
    if pixels.dtype == np.uint8 and _is_image(colours_first(pixels.shape)):
        return None
    return f"{pixels.dtype} {list(pixels.shape)}"


def _is_image(shape: tuple[int, ...]) -> bool:
    return min(shape, default=0) > 0 and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 3))


def _part(keys: list[str], part: str | None) -> str | None:
    names = [part] if part else list(KEYS)
    return next((name for name in names if all(key in keys for key in KEYS[name])), None)


@lru_cache(maxsize=2)
def _old_values(file: Path, stamp: tuple) -> dict[str, Any]:
    """All of an older file; stamp: of the file, so that another one is read."""
    from scipy.io import loadmat

    return loadmat(file)


def _stamp(file: Path) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
