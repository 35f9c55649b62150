"""Images decoded once: kept in memory, or in a file that is mapped into it.

What is kept is the first step of every transform, the image resized to side x side, as uint8
[n, side, side, 3]; the random parts are still drawn each time. So a cached run sees the same bytes
as one that decodes, and needs per image a crop instead of a decode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
from PIL import Image

from ..files import replacing, user_cache_folder
from .decode import load_image
from .images import default_workers
from .layouts import DataError
from .splits import ArraySplit, ImageSplit, ImageSplits, Split
from .transforms import resize

T = TypeVar("T")
CACHES = ("none", "memory", "disk")
FORMAT = 2  # of the file, and of how images are read (decode.py); part of its key
MEMORY_FRACTION = 0.8  # of the free memory that a cache may take: training needs some as well
DECODED_AT_ONCE = 256  # images decoded between two writes
CGROUP = Path("/sys/fs/cgroup")


def cache_splits(
    splits: ImageSplits,
    side: int,
    mode: str,
    folder: str | Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
    workers: int = 0,
) -> ImageSplits:
    """The set with its images decoded and resized to ``side`` x ``side``; arrays stay as they are.

    mode: "memory"; "disk": in ``folder`` (default the user's cache folder), under a name made of
    the side and of every file's path, size and time of change, written whole or not at all, and
    found again by later runs, whatever they hold out; "none": the set as it is. tell: is given a
    line on what is done. workers: processes that will read the result, for the estimate of memory.

    Raises DataError if it does not fit, says how large it is and what does fit; and if an image is
    broken, by its path.
    """
    if mode not in CACHES:
        raise ValueError(f"cache: expected one of {', '.join(CACHES)}, got {mode!r}")
    parts = (splits.train, splits.validation, splits.test)
    files = [part for part in parts if isinstance(part, ImageSplit)]
    paths = sorted({path for part in files for path in part.paths})
    if mode == "none" or not paths:
        return splits
    if mode == "memory":
        pixels = _in_memory(paths, side, tell, workers)
    else:
        place = Path(folder) if folder else user_cache_folder() / "images"
        pixels = _on_disk(paths, side, place, tell)
    position = {path: i for i, path in enumerate(paths)}

    def decoded(part: Split) -> Split:
        if not isinstance(part, ImageSplit):
            return part
        indices = np.array([position[path] for path in part.paths], dtype=np.int64)
        return ArraySplit(pixels, part.targets, indices)

    train, validation, test = map(decoded, parts)
    test = validation if splits.test_is_validation else test
    return dataclasses.replace(splits, train=train, validation=validation, test=test)


def cache_bytes(num_images: int, side: int) -> int:
    """What a cache takes: a byte a channel and pixel."""
    return num_images * side * side * 3


def free_memory(cgroup: Path = CGROUP, proc: Path = Path("/proc")) -> int | None:
    """Bytes of memory that are free, for this container if there is one; None if unknown."""
    amounts = []
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        [kib] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        amounts.append(int(kib) * 1024)
    except (OSError, ValueError):
        pass
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (int((cgroup / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such container, or "max": no limit
            continue
        amounts.append(max(most - now, 0))
    return min(amounts, default=None)


def _in_memory(
    paths: Sequence[Path], side: int, tell: Callable[[str], None], workers: int
) -> np.ndarray:
    copies = copies_in_memory(workers)
    needed, free = copies * cache_bytes(len(paths), side), free_memory()
    if free is not None and needed > MEMORY_FRACTION * free:
        raise DataError(
            f"the decoded images need {gib(needed)} of memory ({len(paths)} of {side} x {side}"
            + (f", in {copies} processes" if copies > 1 else "")
            + f"), but {gib(free)} are free; use --cache disk or --cache none"
        )
    tell(f"decoding {len(paths)} images into memory ({gib(needed)})")
    pixels = np.empty((len(paths), side, side, 3), dtype=np.uint8)
    start = 0
    for part in squares(paths, side):
        pixels[start : start + len(part)] = part
        start += len(part)
    return pixels


def _on_disk(
    paths: Sequence[Path], side: int, folder: Path, tell: Callable[[str], None]
) -> np.ndarray:
    path = folder / f"{side}-{squares_key(paths, side)}.npy"
    shape = (len(paths), side, side, 3)
    pixels = open_squares(path, shape)
    if pixels is None:
        needed = cache_bytes(len(paths), side)
        sizes = f" ({len(paths)} of {side} x {side})"
        make_room(folder, needed, "the decoded images", sizes)
        tell(f"decoding {len(paths)} images into {path} ({gib(needed)})")
        write_squares(path, shape, squares(paths, side))
        pixels = open_squares(path, shape)
    else:
        tell(f"{len(paths)} decoded images are in {path}")
    return pixels


def squares_key(paths: Sequence[Path], side: int) -> str:
    """Tells sets of images apart by what would change their pixels, without reading them."""
    digest = hashlib.sha256(json.dumps([FORMAT, side, PIL.__version__]).encode())
    for path in paths:
        status = path.stat()
        entry = [str(path.resolve()), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()[:24]


def open_squares(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The file mapped into memory; None if it is missing or not what it should be."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def write_squares(path: Path, shape: tuple[int, ...], parts: Iterator[np.ndarray]) -> None:
    """Written, not mapped, so that a full disk is an error and no crash; renamed when complete."""
    with replacing(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part)


def squares(
    images: Sequence[T], side: int, load: Callable[[T], Image.Image] | None = None
) -> Iterator[np.ndarray]:
    """Images resized to side x side, uint8 [<= DECODED_AT_ONCE, side, side, 3], in order.

    load: decodes one, in threads; PIL does so without Python's lock. None: ``load_image``.
    """
    load = load or load_image

    def decode(image: T) -> np.ndarray:
        return np.asarray(resize(load(image), side))

    with ThreadPoolExecutor(default_workers()) as pool:
        for start in range(0, len(images), DECODED_AT_ONCE):
            part = images[start : start + DECODED_AT_ONCE]
            yield np.stack(list(pool.map(decode, part)))


def copies_in_memory(workers: int) -> int:
    """Of a cache that ``workers`` processes read: forked ones share it, those that start as new
    processes get a copy each."""
    method = multiprocessing.get_start_method(allow_none=True)
    forked = (method or multiprocessing.get_all_start_methods()[0]) == "fork"
    return 1 if forked else 1 + workers


def make_room(folder: Path, needed: int, what: str, sizes: str = "") -> None:
    """Makes a cache's folder; DataError if that cannot be, or if the bytes that are needed are not
    free there. what, sizes: of what is kept, for the message."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cache_dir: {folder} cannot be made ({error.strerror}); use another --cache-dir, or "
            "--cache none"
        ) from error
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{what} need {gib(needed)} in {folder}{sizes}, but {gib(free)} are free there; use "
            "another --cache-dir, or --cache none"
        )


def gib(size: int) -> str:
    """Bytes in words: "1.5 GiB", or MiB where it is less than a tenth of one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
