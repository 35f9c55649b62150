"""Names of files and classes that are written otherwise than they are stored.

A name with an accent has two forms in Unicode: one character (NFC), or a letter and its accent
(NFD, as macOS has stored them). They look alike and mean the same. Classes' names are kept as NFC.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path


def one_form(name: str) -> str:
    """The name as NFC, the form that keyboards and most systems write."""
    return unicodedata.normalize("NFC", name)


def is_gone(path: Path) -> bool:
    """Whether there is no such file; one that may not be looked at is there."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        return False
    except OSError:  # there is none, or a link that leads nowhere
        return True


class FileFinder:
    """Finds the files that are meant by paths, reading each folder once.

    A path is taken as it is written, else in another form that exists, else as written. Other
    forms: names stored in another Unicode form, and ``\\`` for ``/`` (lists made on Windows).
    """

    def __init__(self) -> None:
        self._stored: Callable[[Path], dict[str, str]] = lru_cache(maxsize=None)(_stored_names)

    def find(self, path: str | Path) -> Path:
        text = os.fspath(path)
        spellings = [text, text.replace("\\", "/")] if "\\" in text else [text]
        for spelling in spellings:
            plain = Path(spelling)
            found = plain if os.path.exists(plain) else self._other_form(plain)
            if found is not None:
                return found
        return Path(text)

    def _other_form(self, path: Path) -> Path | None:
        """The path with each name as it is stored; None if one of them is not there."""
        if path.as_posix().isascii():
            return None
        found = Path(path.anchor)
        for name in path.parts[1 if path.anchor else 0 :]:
            step = found / name
            if not os.path.exists(step):
                stored = self._stored(found).get(one_form(name))
                if stored is None:
                    return None
                step = found / stored
            found = step
        return found


def _stored_names(folder: Path) -> dict[str, str]:
    try:
        return {one_form(name): name for name in os.listdir(folder)}
    except OSError:
        return {}
