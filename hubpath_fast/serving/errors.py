"""What is raised where a model cannot be exported, or its package is not the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model import HubPathway


class ExportError(ValueError):
    """No package was written; the message says why, and of which expert."""


def expert_name(model: HubPathway, index: int) -> str:
    return f"expert {index} ({model.origin.labels[index]})"


def refusal(part: str, error: BaseException, given: str = "") -> ExportError:
    """What to raise for a part of the model that an error is about. given: what it failed on, with
    a colon, where the error would not say it."""
    return ExportError(f"{part} cannot be exported ({given}{first_line(error)})")


@contextlib.contextmanager
def refusing(part: str, given: str = "") -> Iterator[None]:
    """What is raised within becomes the ``refusal`` of a part."""
    try:
        yield
    except Exception as error:  # torch has many ways to refuse, and no common class
        raise refusal(part, error, given) from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line: torch's go on with graphs and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of "Constraints violated (batch)!" the point is the list behind it, of "Got graph break:" what
    # comes next.
    points = [line for line in lines[1:] if line.startswith("- ")]
    if not points and lines and lines[0].endswith(":"):
        points = lines[1:]
    text = " ".join([*lines[:1], *points[:1]])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
