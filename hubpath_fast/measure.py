"""What a task is judged by: a name, which way is better, and how a value reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A figure of merit, one value for each sample or their mean.

    name: its key in logs and results, such as "accuracy". better: "max" or "min". limits: the
    values it can take, (lowest, highest); None where it has no bound. scale, unit, decimals: how it
    is shown: a value of 0.934 as "93.4 %" with 100, "%" and 1. title: what readers call it, such as
    "NME"; by default its name.
    """

    name: str
    better: str = "max"
    limits: tuple[float | None, float | None] = (None, None)
    scale: float = 1.0
    unit: str = ""
    decimals: int = 3
    title: str = ""

    def __post_init__(self) -> None:
        if self.better not in ("max", "min"):
            raise ValueError(f'better: expected "max" or "min", got {self.better!r}')
        object.__setattr__(self, "title", self.title or self.name)

    @property
    def sign(self) -> int:
        """1 where larger is better, -1 where smaller is."""
        return 1 if self.better == "max" else -1

    def is_better(self, value: float, than: float) -> bool:
        """Whether ``value`` is strictly better; NaN never is, and all others are than NaN."""
        return self.sign * value > self.sign * than or (math.isnan(than) and not math.isnan(value))

    def best(self, values: Sequence[float]) -> float:
        return values[self.ranked(values)[0]]

    def ranked(self, values: Sequence[float]) -> list[int]:
        """Positions of the values, the best first, NaN last, among equals the lowest position."""
        return sorted(
            range(len(values)), key=lambda i: (math.isnan(v := values[i]), -self.sign * v)
        )

    def best_shown(self, values: Sequence[float | None]) -> list[bool]:
        """Which values are the best, ties as printed included; None and NaN do not compete."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        top = self.number(self.best(known)) if known else None
        return [value is not None and self.number(value) == top for value in values]

    def number(self, value: float) -> str:
        """The value in its unit, without naming it."""
        return f"{self.scale * value:.{self.decimals}f}"

    def text(self, value: float) -> str:
        return f"{self.number(value)} {self.unit}" if self.unit else self.number(value)

    @property
    def worst(self) -> float | None:
        """The worst value it can take; None where it has no bound on that side."""
        return self.limits[0 if self.better == "max" else 1]

    @property
    def label(self) -> str:
        """For axes and columns: "accuracy, %"."""
        return f"{self.title}, {self.unit}" if self.unit else self.title
