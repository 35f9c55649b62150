"""Files that are whole or absent: written under another name, synced, renamed."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".part"  # the ending of files that are being written
STALE_SECONDS = 3600  # that nothing was written to an unfinished file: nobody writes it any more


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends.

    A crash, a full disk or an exception leaves the old one, whole. The folder is made where it is
    missing; what killed processes left of earlier attempts is deleted. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f".{glob.escape(path.name)}.*", STALE_SECONDS)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        # Not tempfile's: its files are the user's alone, these are made as the umask says.
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, pattern: str = f".*{UNFINISHED}", older: float = 0.0) -> None:
    """Deletes what killed processes left of ``replacing``.

    older: seconds since the last change; 0 only where nothing else writes.
    """
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another was faster, or it is a folder
            if time.time() - left.stat().st_mtime >= older:
                left.unlink()


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes a whole file as ``replacing`` does, and returns its path."""
    path = Path(path)
    with replacing(path) as file:
        file.write(data)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """``write_bytes`` of ``printable`` text in UTF-8."""
    return write_bytes(path, printable(text).encode())


def printable(text: str) -> str:
    """The text, in which bytes of a file's name that are no UTF-8 (to Python surrogates, which
    nothing can draw or encode) are spelt out, as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_json(path: str | Path, values: Any) -> Path:
    """``write_bytes`` of indented JSON."""
    return write_text(path, json.dumps(values, indent=2) + "\n")


def user_cache_folder() -> Path:
    """The user's cache folder for this package; it may not exist yet."""
    import platformdirs  # here: most uses never ask, and benchmark machines may not have it

    return Path(platformdirs.user_cache_dir("hubpath_fast"))
