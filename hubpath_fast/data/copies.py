"""Files that are equal byte by byte, found without reading most of them.

Files of one size are compared by some bytes in their middle (heads of images are alike), and only
those that share these are read whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from .decode import CHECKING_THREADS

T = TypeVar("T")
SAMPLE = 4096  # bytes from the middle of a file
AT_ONCE = 64  # files that a thread looks at before it reports


def equal_files(paths: Sequence[Path]) -> list[list[int]]:
    """Groups of positions in ``paths`` whose files hold the same bytes, in order; a file that is
    named twice is equal to itself. Empty and unreadable files are in no group."""
    positions: dict[Path, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        positions[path].append(i)
    groups = [list(positions)]
    for key in (_size, _sample, _digest):
        groups = [same for group in groups for same in _alike(group, key)]
    found = [[i for path in group for i in positions[path]] for group in groups]
    grouped = {path for group in groups for path in group}
    found += [same for path, same in positions.items() if len(same) > 1 and path not in grouped]
    return sorted(sorted(same) for same in found)


def _alike(paths: Sequence[Path], key: Callable[[Path], Hashable]) -> list[list[Path]]:
    """The files that share their key with another one, by key; those without a key are left out."""
    by_key: dict[Hashable, list[Path]] = defaultdict(list)
    for path, value in zip(paths, of_each_file(paths, key), strict=True):
        if value is not None:
            by_key[value].append(path)
    return [group for group in by_key.values() if len(group) > 1]


def of_each_file(paths: Sequence[Path], look: Callable[[Path], T]) -> list[T | None]:
    """What ``look`` says of each file, several at a time; None where the file cannot be read."""

    def some(start: int) -> list[T | None]:
        return [_try(look, path) for path in paths[start : start + AT_ONCE]]

    if len(paths) <= AT_ONCE:
        return some(0)
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        return [value for part in pool.map(some, range(0, len(paths), AT_ONCE)) for value in part]


def _try(look: Callable[[Path], T], path: Path) -> T | None:
    try:
        return look(path)
    except OSError:
        return None


def _size(path: Path) -> int | None:
    return os.stat(path).st_size or None


def _sample(path: Path) -> bytes:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - SAMPLE, 0) // 2)
        return hashlib.sha256(file.read(SAMPLE)).digest()


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.digest()
