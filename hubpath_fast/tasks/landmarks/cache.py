"""Windows of faces cut once: kept in memory, or in a file that is mapped into it.

What is kept is what crops are read from anyway, so that a cached run sees the same bytes as one
that decodes: per face a window of some 500 pixels a side in place of its photograph. The file is

    the windows' pixels, one after another, each uint8 [3, h, w]
    the index, int64 [n, 6]: where it begins, h, w, and the window's left, top and factor
    a line of JSON, padded with blanks to TAIL bytes: what it is, n, and a checksum of the index

Photographs are read once each, however many faces they show.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from ...data.cache import (
    CACHES,
    MEMORY_FRACTION,
    copies_in_memory,
    free_memory,
    gib,
    make_room,
)
from ...data.images import default_workers
from ...data.layouts import DataError
from ...files import replacing, user_cache_folder
from .faces import DEFAULT_REACH, Face, FaceAugment, FaceSplit, FaceSplits
from .photos import look
from .read import faces_by_image
from .read_mat import MatImage
from .windows import Window, cut, find_place

FORMAT = "hubpath-faces-1"  # of the file, and of how windows are cut; part of its key
TAIL = 256
AT_ONCE = 64  # photographs decoded between two writes
COLUMNS = 6


class WindowStore:
    """The windows of faces. size: of the crops that they are for. reach: see ``find_place``. index:
    int64 [n, 6]. pixels: uint8, of all windows. file: they are mapped from; None: they are in
    memory."""

    def __init__(
        self, size: int, reach: float, index: np.ndarray, pixels: np.ndarray, file: Path | None
    ):
        self.size, self.reach, self.index, self.file = size, reach, index, file
        self._pixels = pixels

    def serves(self, size: int, reach: float) -> bool:
        """Whether crops of a size, of a reach, are the same as from the photographs."""
        return size == self.size and reach <= self.reach

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> Window:
        start, height, width, left, top, factor = self.index[place].tolist()
        pixels = self._pixels[start : start + 3 * height * width].reshape(3, height, width)
        return Window(torch.from_numpy(pixels), left, top, factor)

    def __getstate__(self) -> dict[str, Any]:
        # A process that is not forked maps the file itself, rather than be sent all of it.
        state = dict(self.__dict__)
        if self.file is not None:
            state["_pixels"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.file is not None:
            self._pixels = _mapped(self.file)


def cache_faces(
    splits: FaceSplits,
    size: int,
    augment: FaceAugment | None,
    mode: str,
    folder: str | Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
    workers: int = 0,
) -> FaceSplits:
    """The set with the windows of its faces cut, for crops of ``size`` pixels.

    augment: of training. mode: "memory"; "disk": in ``folder`` (default the user's cache folder),
    under a name made of every face and of its photograph's path, size and time of change, written
    whole or not at all, and found again by later runs, whatever they hold out; "none": the set as
    it is. tell: is given a line on what is done. workers: processes that will read the result, for
    the estimate of memory.

    Raises DataError if it does not fit, says how large it is and what does fit; and if a photograph
    is broken, by its path.
    """
    if mode not in CACHES:
        raise ValueError(f"cache: expected one of {', '.join(CACHES)}, got {mode!r}")
    if mode == "none":
        return splits
    reach = max(DEFAULT_REACH, augment.reach if augment else 0.0)
    parts = (splits.train, splits.validation, splits.test)
    # In an order that does not depend on what is held out.
    faces = {_identity(face): face for part in parts for face in part.faces}
    faces = {key: faces[key] for key in sorted(faces)}
    maker = _Maker(list(faces.values()), size, reach)
    if mode == "memory":
        store = _in_memory(maker, tell, workers)
    else:
        place = Path(folder) if folder else user_cache_folder() / "faces"
        store = _on_disk(maker, list(faces), place, tell)
    position = {key: i for i, key in enumerate(faces)}

    def cached(part: FaceSplit) -> FaceSplit:
        places = tuple(position[_identity(face)] for face in part.faces)
        return dataclasses.replace(part, store=store, places=places)

    train, validation, test = map(cached, parts)
    test = validation if splits.test_is_validation else test
    return dataclasses.replace(splits, train=train, validation=validation, test=test)


def _identity(face: Face) -> str:
    """What a window depends on, besides the photograph's bytes."""
    source = face.source
    photo = [str(source.file.resolve()), source.key, source.index] if isinstance(
        source, MatImage
    ) else [str(source.resolve())]  # fmt: skip
    return json.dumps([*photo, face.upright, *face.center, face.scale, face.origin])


class _Maker:
    """Cuts the windows of faces, in the order of their photographs."""

    def __init__(self, faces: Sequence[Face], size: int, reach: float):
        self.faces, self.size, self.reach = faces, size, reach
        self.groups = list(faces_by_image(faces))

    def bytes(self) -> int:
        """What the windows take, by the heads of their photographs."""
        with ThreadPoolExecutor(default_workers()) as pool:
            return sum(pool.map(self._bytes, self.groups))

    def _bytes(self, group: tuple[Path | MatImage, list[int]]) -> int:
        source, members = group
        total = 0
        for i in members:
            width, height = self.faces[i].size or _size(source, self.faces[i].upright)
            h, w = find_place(self.faces[i], self.size, self.reach, width, height).shape
            total += 3 * h * w
        return total

    def windows(self) -> Iterator[tuple[int, Window]]:
        """(a face's position, its window)."""
        with ThreadPoolExecutor(default_workers()) as pool:
            for start in range(0, len(self.groups), AT_ONCE):
                for made in pool.map(self._cut, self.groups[start : start + AT_ONCE]):
                    yield from made

    def _cut(self, group: tuple[Path | MatImage, list[int]]) -> list[tuple[int, Window]]:
        _, members = group
        image = self.faces[members[0]].pixels()
        height, width = image.shape[1:]
        found = []
        for i in members:
            place = find_place(self.faces[i], self.size, self.reach, width, height)
            found.append((i, cut(image, place)))
        return found


def _size(source: Path | MatImage, upright: bool) -> tuple[int, int]:
    if isinstance(source, MatImage):
        return source.shape()
    seen = look(source)
    if seen.fault is not None:
        raise DataError(f"cannot read the image {seen.fault}")
    return seen.shown_size(upright)


def _in_memory(maker: _Maker, tell: Callable[[str], None], workers: int) -> WindowStore:
    copies, size, free = copies_in_memory(workers), maker.bytes(), free_memory()
    if free is not None and copies * size > MEMORY_FRACTION * free:
        raise DataError(
            f"the windows of the faces need {gib(copies * size)} of memory ({len(maker.faces)} "
            + (f"in {copies} processes" if copies > 1 else "of them")
            + f"), but {gib(free)} are free; use --cache disk or --cache none"
        )
    tell(f"cutting {len(maker.faces)} faces into memory ({gib(size)})")
    pixels, index = np.empty(size, dtype=np.uint8), _empty_index(maker)
    start = 0
    for i, window in maker.windows():
        flat = window.pixels.numpy().reshape(-1)
        pixels[start : start + len(flat)] = flat
        index[i] = _row(start, window)
        start += len(flat)
    return WindowStore(maker.size, maker.reach, index, pixels, None)


def _on_disk(
    maker: _Maker, identities: Sequence[str], folder: Path, tell: Callable[[str], None]
) -> WindowStore:
    file = folder / f"{maker.size}-{_key(maker, identities)}.faces"
    store = _open(file, maker)
    if store is not None:
        tell(f"{len(maker.faces)} faces are in {file}")
        return store
    size = maker.bytes()
    make_room(folder, size, f"the windows of the {len(maker.faces)} faces")
    tell(f"cutting {len(maker.faces)} faces into {file} ({gib(size)})")
    _write(file, maker)
    store = _open(file, maker)
    if store is None:
        raise DataError(f"{file} is not what was just written; use --cache memory or none")
    return store


def _key(maker: _Maker, identities: Sequence[str]) -> str:
    """Tells sets of faces apart by what would change their windows, without reading photographs."""
    versions = [PIL.__version__, torchvision.__version__]
    digest = hashlib.sha256(json.dumps([FORMAT, maker.size, maker.reach, versions]).encode())
    stamps: dict[Path, tuple[int, int]] = {}
    for face, identity in zip(maker.faces, identities, strict=True):
        file = face.source.file if isinstance(face.source, MatImage) else face.source
        if file not in stamps:
            status = os.stat(file)
            stamps[file] = status.st_size, status.st_mtime_ns
        digest.update(json.dumps([identity, *stamps[file]]).encode())
    return digest.hexdigest()[:24]


def _write(file: Path, maker: _Maker) -> None:
    """Written, not mapped, so that a full disk is an error and no crash; renamed when complete."""
    index, start = _empty_index(maker), 0
    with replacing(file) as out:
        for i, window in maker.windows():
            flat = window.pixels.numpy().reshape(-1)
            out.write(flat)
            index[i] = _row(start, window)
            start += len(flat)
        out.write(index.tobytes())
        about = {"format": FORMAT, "n": len(index), "index": zlib.crc32(index.tobytes())}
        out.write(json.dumps(about).encode().ljust(TAIL))


def _open(file: Path, maker: _Maker) -> WindowStore | None:
    """The file mapped into memory; None if it is missing or not what it should be."""
    count = len(maker.faces)
    try:
        pixels = _mapped(file)
        about = json.loads(bytes(pixels[-TAIL:]))
        end = len(pixels) - TAIL - count * COLUMNS * 8
        raw = bytes(pixels[end : len(pixels) - TAIL]) if end >= 0 else b""
        if about != {"format": FORMAT, "n": count, "index": zlib.crc32(raw)}:
            return None
        index = np.frombuffer(raw, dtype="<i8").reshape(count, COLUMNS)
    except (OSError, ValueError):
        return None
    if int((3 * index[:, 1] * index[:, 2]).sum()) != end:
        return None
    return WindowStore(maker.size, maker.reach, index, pixels, file)


def _mapped(file: Path) -> np.ndarray:
    # Copied where it is written to, which nobody does: torch warns of what cannot be.
    return np.memmap(file, dtype=np.uint8, mode="c")


def _empty_index(maker: _Maker) -> np.ndarray:
    return np.zeros((len(maker.faces), COLUMNS), dtype="<i8")


def _row(start: int, window: Window) -> tuple[int, ...]:
    _, height, width = window.pixels.shape
    return start, height, width, window.left, window.top, window.factor
