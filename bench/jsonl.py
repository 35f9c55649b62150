"""Result files: one JSON object a line, on disk as soon as it is known.

Who writes may be killed at any moment. So a line is flushed to the disk before the next is made,
a reader passes over what was torn, and a writer that finds a torn end begins a new line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def write(path: Path, rows: list[dict]) -> None:
    """Adds rows to the end of a file. They are on disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """The rows of a file, without those that are torn; none where there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
