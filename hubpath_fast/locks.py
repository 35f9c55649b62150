"""One process at a time in a folder: a lock of the operating system, which a crash releases.

``flock`` on POSIX, ``msvcrt.locking`` on Windows, on the hidden file ``.lock`` in the folder, which
says who has it. filelock is not used: depending on its version it empties the file of a holder,
leaves the lock with forked processes, or falls back to a lock that a crash does not release.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rich.console import Console

from .files import remove_leftovers
from .notes import show_notes

LOCK = ".lock"
MADE = ".lock-made"  # how many folders were made for this one
HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}  # by another


class CannotLock(Exception):
    """The file system has no locks. Its text: the system's reason."""


@contextlib.contextmanager
def locked(
    folder: str | Path, what: str = "run", console: Console | None = None, alone: bool = True
) -> Iterator[None]:
    """Within, no other process (and no other block) that asks works in the folder.

    The folder is made where it is missing, and removed again if it is still empty at the end.

    what: is at work here, in the message: "run", "comparison". console: where it is said that a
    file system has no locks; the block then runs without one. None: standard output. alone: nobody
    writes into the folder without asking, so that what a killed process left unfinished in it (see
    ``files.replacing``) is deleted.

    Raises ValueError, with who has the lock, if another has it, or if the folder is a file; OSError
    if there cannot be such a folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; give a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    handle, mark, ours = None, folder / MADE, False
    try:
        try:
            if made:
                # Of several that start at once another may get the lock, and it is the one to
                # remove what this one makes.
                with contextlib.suppress(FileNotFoundError):  # removed by another meanwhile
                    folder.mkdir(parents=True, exist_ok=True)
                    mark.write_text(str(len(made)), encoding="utf-8")
            handle = _acquire(folder / LOCK, what)
            ours = True
            if alone:
                remove_leftovers(folder)
        except CannotLock as error:
            ours = True
            text = f"{folder} cannot be locked ({error}): see to it that nothing else works in it"
            show_notes([text], console or Console())
        yield
    finally:
        if ours:
            with contextlib.suppress(OSError, ValueError):  # there is none: it was not made here
                count = max(len(made), int(mark.read_text(encoding="utf-8")))
                made = [folder, *folder.parents][:count]
                mark.unlink()
        if handle is not None:
            handle.release()
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


class _Handle:
    """An open lock file. Forked processes close theirs at once: a lock belongs to all who have the
    file open, and workers may outlive a killed trainer by seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.close)

    def lock(self) -> bool:
        """Whether it is ours now; CannotLock where there are no locks."""
        try:
            _lock(self._number)
        except OSError as error:
            if error.errno in HELD:
                return False
            raise CannotLock(error.strerror) from error
        return True

    def is_current(self) -> bool:
        """False if the file was removed by the one who had it last."""
        try:
            return os.path.samestat(os.fstat(self._number), os.stat(self.path))
        except FileNotFoundError:
            return False

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # only a courtesy to those who are refused
            os.ftruncate(self._number, 0)
            os.write(self._number, text.encode())

    def release(self) -> None:
        """Removes the file and gives the lock back. Whoever waits for it at that moment finds that
        the file is gone, and makes another."""
        if self._number is None:  # in a forked process, which never had it
            return
        ours = self.is_current()
        if os.name == "nt":  # an open file cannot be removed there
            self.close()
        if ours:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            os.close(number)


def _acquire(path: Path, what: str) -> _Handle:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = _Handle(path)
        except FileNotFoundError:  # another removed the folder that it had made
            continue
        try:
            if not handle.lock():
                raise ValueError(
                    f"out: another {what} is at work in {path.parent}{_holder(path)}; wait until "
                    "it ends, or stop it (it saves where it stands), or choose another folder"
                )
            if handle.is_current():
                since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
                holder = {"pid": os.getpid(), "host": platform.node(), "since": since}
                handle.write(json.dumps(holder) + "\n")
                return handle
        except CannotLock:
            handle.release()
            raise
        except BaseException:
            handle.close()
            raise
        handle.close()


def _holder(path: Path) -> str:
    """Who has the lock, in words; empty where it is not known."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return f" (process {held['pid']} on {held['host']}, since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _lock(handle: int) -> None:
    """OSError if it cannot be had at once."""
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, 2**30, os.SEEK_SET)  # a byte behind the text, which stays readable
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
