"""What the readers of lists have in common: rows as they are written, and how a fault is told.

A problem is one line, "file:line: what it is, expected what"; a fault of the whole file has no
line. A row with a fault is left out, the others are what they would be without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.text import Text

CELLS_SHOWN = 3  # of a row with many that are no numbers


@dataclass(frozen=True)
class Row:
    """A face as a list has it. name: of its image. points: float64 [L, 2]. box: scale, center_x and
    center_y as written; None where the list has none. groups: the subsets it is said to be in.
    occluded: bool [L]. source: where the pixels are, if that is no file of this name."""

    line: int
    name: str
    points: Tensor
    box: tuple[float, float, float] | None = None
    groups: tuple[str, ...] = ()
    occluded: Tensor | None = None
    source: Any = None


@dataclass
class Listing:
    """A list: its rows that could be read, and the problems with the others. names: of the
    landmarks, where the list has them. told: whether it says of each face which groups it is in.
    guessed: its text, where the encoding is not certain."""

    file: Path
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    names: tuple[str, ...] = ()
    told: bool = False
    guessed: Text | None = None

    def add(self, line: int | None, what: str) -> None:
        self.problems.append(problem(self.file, line, what))


def problem(file: str | Path, line: int | None, what: str) -> str:
    return f"{file}: {what}" if line is None else f"{file}:{line}: {what}"


def encoding_fault(text: Text, line: int) -> str:
    """What to say of a line whose letters were guessed wrong."""
    what = str(text.refuse(line)).partition(f"line {line}: ")[2]
    return what.replace("; ", ", expected UTF-8: ", 1)


def read_numbers(cells: Sequence[str], columns: Sequence[str]) -> tuple[list[float], str | None]:
    """(the numbers, None), or ([], what is wrong with which cells). columns: their names."""
    try:
        values = [float(cell) for cell in cells]
        if all(map(math.isfinite, values)):
            return values, None
    except ValueError:
        pass
    wrong = []
    for cell, column in zip(cells, columns, strict=True):
        text = cell.strip()
        try:
            if math.isfinite(float(text)):
                continue
        except ValueError:
            pass
        wrong.append(f"column {column} is {repr(text) if text else 'empty'}")
    shown = ", ".join(wrong[:CELLS_SHOWN])
    more = len(wrong) - CELLS_SHOWN
    shown += f" and {more} more" if more > 0 else ""
    return [], f"{shown}, expected finite numbers such as 103.5"


def as_points(values: Sequence[float]) -> Tensor:
    """x, y, x, y, ... -> float64 [L, 2]."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 2)
