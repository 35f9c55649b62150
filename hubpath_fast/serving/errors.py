"""What is raised where a model cannot be exported, or its package is not the model."""

from __future__ import annotations


class ExportError(ValueError):
    """No package was written; the message says why, and of which expert."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: torch's go on with graphs and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of "Constraints violated (batch)!" the point is the list behind it.
    points = [line for line in lines[1:] if line.startswith("- ")]
    text = " ".join([*lines[:1], *points[:1]])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
