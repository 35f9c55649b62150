"""Text files as users' programs write them: UTF-8, UTF-16 as PowerShell's, and older encodings."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .walk import DataError

# UTF-32 first: its mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
REMEDY = "save it as UTF-8 (Windows PowerShell: ... | Out-File -Encoding utf8 FILE)"
ZEROS = "it holds zero bytes, as of two encodings in one file"
WINDOWS = "cp1252"  # what Western Windows calls ANSI; Latin-1 but for 0x80..0x9f


@dataclass(frozen=True)
class Text:
    """lines: without their ends. guessed: the encoding is not certain, so that letters other than
    ASCII have to be checked against something else."""

    file: Path
    lines: tuple[str, ...]
    guessed: bool = False

    def refuse(self, number: int) -> DataError:
        """The error for a line, counted from 1, whose letters were guessed wrong."""
        line = self.lines[number - 1]
        [letter, *_] = [c for c in line if not c.isascii()]
        byte = letter.encode(WINDOWS, errors="replace")[0]
        return _refuse(self.file, number, f"the byte 0x{byte:02x} is no UTF-8")


def read_text(file: Path) -> Text:
    """Reads UTF-8, UTF-16 and UTF-32, the last two by their mark or by their zero bytes; else as
    the old encoding of Windows, ``guessed``.

    Raises DataError, with the line and what to do, for anything else, and if it cannot be read.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error
    encoding, data = _by_mark(data)
    if encoding is not None:
        return Text(file, _lines(_decode(file, data, encoding)))
    if b"\0" in data:
        return Text(file, _lines(_decode(file, data, _wide(file, data))))
    try:
        return Text(file, _lines(data.decode("utf-8")))
    except UnicodeDecodeError as error:
        try:
            return Text(file, _lines(data.decode(WINDOWS)), guessed=True)
        except UnicodeDecodeError:
            raise _undecodable(file, data, error) from error


def read_paths(data: bytes) -> list[str]:
    """The paths of a list: a line each, or with zero bytes between them as ``find -print0`` writes
    it; UTF-8, or UTF-16 and UTF-32 with their marks. Bytes that are no text stay as they are."""
    encoding, data = _by_mark(data)
    if encoding not in (None, "utf-8"):
        parts = _lines(data.decode(encoding, "replace"))
    elif b"\0" in data:
        parts = [os.fsdecode(part) for part in data.split(b"\0")]
    else:
        parts = [os.fsdecode(line).removesuffix("\r") for line in data.split(b"\n")]
    return [part for part in parts if part.strip()]


def _by_mark(data: bytes) -> tuple[str | None, bytes]:
    """(the encoding that a text begins with the mark of, the text without it)."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding, data[len(mark) :]
    return None, data


def _wide(file: Path, data: bytes) -> str:
    """UTF-16's order of bytes, of a text that begins with an ASCII letter; DataError if its zero
    bytes come of anything else."""
    first, second = not data[0], len(data) > 1 and not data[1]
    if first == second:
        raise _refuse(file, data[: data.index(0)].count(b"\n") + 1, ZEROS)
    return "utf-16-be" if first else "utf-16-le"


def _decode(file: Path, data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(file, data, error) from error
    if "\0" in text:
        raise _refuse(file, text[: text.index("\0")].count("\n") + 1, ZEROS)
    return text


def _undecodable(file: Path, data: bytes, error: UnicodeDecodeError) -> DataError:
    wide = 2 if "16" in error.encoding else 4 if "32" in error.encoding else 1
    number = data[: error.start].count(b"\n") + 1
    byte = f"0x{data[error.start]:02x}" if error.start < len(data) else "its end"
    what = f"the byte {byte} is no {error.encoding.upper()}"
    return _refuse(file, number, what if wide == 1 else f"{what}; was it cut short?")


def _refuse(file: Path, number: int, what: str) -> DataError:
    return DataError(f"{file}, line {number}: {what}; {REMEDY}")


def _lines(text: str) -> tuple[str, ...]:
    # Not splitlines(): it ends lines at letters that names may hold. Marks are left in the middle
    # where files are put one after the other.
    return tuple(re.split(r"\r\n|\r|\n", text.replace("\ufeff", "")))
