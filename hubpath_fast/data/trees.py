"""A folder as a tree of text, short enough for a message."""

from __future__ import annotations

from pathlib import Path

DEPTH, ENTRIES = 3, 8  # levels below the root, and entries of each folder


def draw_tree(root: Path, depth: int = DEPTH) -> str:
    """``root`` and what lies below it: folders first, a few entries of each, the rest counted."""
    return "\n".join([str(root), *_lines(root, depth)])


def _lines(folder: Path, depth: int) -> list[str]:
    try:
        entries = sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name))
    except OSError as error:
        return [f"└─ (cannot be read: {error.strerror})"]
    if not entries:
        return ["└─ (empty)"]
    rest, lines = len(entries) - ENTRIES, []
    for i, path in enumerate(entries[:ENTRIES]):
        last = i == len(entries) - 1
        lines.append(f"{'└─' if last else '├─'} {path.name}{'/' if path.is_dir() else ''}")
        if path.is_dir() and depth > 1:
            lines += [f"{'  ' if last else '│ '} {line}" for line in _lines(path, depth - 1)]
    if rest > 0:
        lines.append(f"└─ and {rest} more")
    return lines
