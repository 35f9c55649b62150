"""Files that are whole or absent: written under another name, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends.

    A crash, a full disk or an exception leaves the old one, whole. The folder is made where it is
    missing. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)  # mkstemp's own mode would hide it from others
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes a whole file as ``replacing`` does, and returns its path."""
    path = Path(path)
    with replacing(path) as file:
        file.write(data)
    return path


def write_json(path: str | Path, values: Any) -> Path:
    """``write_bytes`` of indented JSON."""
    return write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def user_cache_folder() -> Path:
    """The user's cache folder for this package; it may not exist yet."""
    import platformdirs  # here: most uses never ask, and benchmark machines may not have it

    return Path(platformdirs.user_cache_dir("hubpath_fast"))
