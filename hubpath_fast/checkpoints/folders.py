"""Folders that are replaced as a whole: written aside, synced, renamed.

Saving over ``last/`` writes ``.last.new/``, moves ``last/`` to ``.last.old/`` and ``.last.new/`` to
``last/``: one of ``last/`` and ``.last.old/`` is whole at every moment, and readers look for both;
one that was overtaken by a save reads again. Where ``last`` is a link, all of that happens to the
folder that it leads to, and beside that one; the link stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..files import sync
from .errors import CheckpointError, errno_of

T = TypeVar("T")
READS = 100  # of a checkpoint that a running trainer replaces meanwhile
RENAME_SECONDS = 10.0  # that a reader may keep a folder from being renamed, where it can


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of ``folder`` when the block ends.

    Until that is done the previous one stays whole, and where it was. Raises OSError (with the
    errno, such as ENOSPC) when it cannot be written; nothing half-written is left behind.
    ValueError for what is no folder that could be renamed.
    """
    folder = _renamable(Path(folder))
    new, old = _temporary(folder, "new"), _temporary(folder, "old")
    with saying_unsaved(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _recover(folder)
            _remove(new)
            new.mkdir()
            yield new
            for path in sorted(new.rglob("*")):
                sync(path)
            sync(new)
            if folder.exists():
                _rename(folder, old)
            _rename(new, folder)
            sync(folder.parent)
        except BaseException:
            _recover(folder)
            _remove(new)
            raise
    _remove(old)


@contextlib.contextmanager
def saying_unsaved(folder: Path) -> Iterator[None]:
    """Around what writes a folder that is to take the place of ``folder``: what the system raises
    becomes an OSError that says what is left."""
    try:
        yield
    except BaseException as error:
        number = errno_of(error)
        # Said already: within, or, of an error without a number, by another rank.
        said = getattr(error, "said", isinstance(error, OSError) and error.errno is None)
        if number is None or said:
            raise
        kept = "the previous checkpoint is whole" if folder.exists() else "there is no earlier one"
        hint = ""
        if number == errno.ENOSPC:
            free = shutil.disk_usage(folder.parent).free / 2**20
            hint = f" ({free:.0f} MiB free); make room and resume"
        text = f"cannot save: {os.strerror(number)}{hint}; {kept}"
        unsaved = OSError(number, text, str(folder))
        unsaved.said = True
        raise unsaved from error


def find_checkpoint(folder: Path) -> Path | None:
    """Where the checkpoint lies: ``folder``, its predecessor if a save was cut short, or None."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    old = _temporary(folder.resolve(), "old")
    return old if old.is_dir() else None


def existing(folder: Path) -> Path:
    """``find_checkpoint``; CheckpointError where there is none."""
    found = find_checkpoint(folder)
    if found is None:
        raise CheckpointError(f"there is no checkpoint at {folder}")
    return found


def discard_unfinished(folder: Path) -> None:
    """Clears away what a save left that was cut short. Only where nothing else saves."""
    folder = Path(folder).resolve()
    _recover(folder)
    _remove(_temporary(folder, "new"))


def while_it_stands(folder: Path, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of the checkpoint's folder; read again if it fails over a save."""
    for _ in range(READS):
        version = _version(folder)
        try:
            return read(existing(folder))
        except Exception:
            if version == _version(folder):  # else a run has saved meanwhile
                raise
    raise CheckpointError(f"{folder} is replaced again and again while it is read; try again")


def _version(folder: Path) -> tuple[int, int] | None:
    """Tells the checkpoints apart that were in a folder one after the other."""
    with contextlib.suppress(OSError):
        status = (find_checkpoint(folder) or folder).stat()
        return status.st_ino, status.st_ctime_ns
    return None


def _renamable(folder: Path) -> Path:
    """The folder without links, if it can be replaced; ValueError where it cannot."""
    found = folder.resolve()
    reason = None
    if os.path.ismount(found):
        reason = "is a mount point, which cannot be renamed"
    elif found.exists() and not found.is_dir():
        reason = "is a file"
    elif found == Path.cwd():
        reason = "is the current folder, which would be taken from under this process"
    if reason is not None:
        raise ValueError(
            f"folder: expected one that can be replaced as a whole, but {str(folder)!r} {reason}; "
            "name another, such as a new folder in it or beside it"
        )
    return found


def _temporary(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _remove(path: Path) -> None:
    """What a save has left, of whatever kind."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Undo a save that was cut short between its two renames, or finish tidying after one."""
    old = _temporary(folder, "old")
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    _remove(old)


def _rename(folder: Path, to: Path) -> None:
    """``os.replace``, which on Windows has to wait while another process reads a file in it."""
    until = time.monotonic() + (RENAME_SECONDS if os.name == "nt" else 0)
    while True:
        try:
            return os.replace(folder, to)
        except PermissionError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)
