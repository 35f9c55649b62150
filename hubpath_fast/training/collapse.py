"""Warnings about routing that has settled on one expert, or that never uses some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# An expert counts as idle after this many log intervals in a row without a row of its own, if an
# equal share would have brought it EXPECTED_ROWS by then.
IDLE_INTERVALS = 3
EXPECTED_ROWS = 32


class RoutingCollapseWarning(UserWarning):
    """The routing uses (almost) one expert, or never uses some."""


class CollapseWatch:
    """Says once that the mean routing has (almost) settled on one expert, and once of each expert
    that it has had no rows for a long stretch."""

    def __init__(self, threshold: float, names: Sequence[str] | None = None) -> None:
        self.threshold, self.names = threshold, names
        self.intervals: list[int] = []  # [M] log intervals since the expert's last row
        self.missed: list[int] = []  # [M] rows that went to others meanwhile
        self.told: list[str] = []  # what has been warned about

    def update(self, summary: dict[str, Any]) -> list[str]:
        """The warnings that one line of the log gives rise to, usually none."""
        if "rows" not in summary:
            return []
        rows, found = summary["rows"], {}
        self.intervals = self.intervals or [0] * len(rows)
        self.missed = self.missed or [0] * len(rows)
        fraction = summary["entropy_fraction"]
        if fraction < self.threshold:
            top = max(range(len(rows)), key=lambda i: summary["mean_weight"][i])
            found["entropy"] = (
                f"the routing has collapsed: the mean weights' entropy is {fraction:.3f} of its "
                f"maximum, {self.name(top)} has {summary['mean_weight'][top]:.1%}; raise the "
                "weight of the explore loss or lower lr_router"
            )
        for i, count in enumerate(rows):
            self.intervals[i] = 0 if count else self.intervals[i] + 1
            self.missed[i] = 0 if count else self.missed[i] + sum(rows)
            enough = self.missed[i] >= EXPECTED_ROWS * len(rows)
            if self.intervals[i] >= IDLE_INTERVALS and enough:
                found[f"expert {i}"] = (
                    f"{self.name(i)} has had none of the last {self.missed[i]} rows and learns "
                    "nothing; raise the weight of the explore loss or leave it out of the hub"
                )
        new = [key for key in found if key not in self.told]
        self.told += new
        return [found[key] for key in new]

    def name(self, i: int) -> str:
        return f"expert {i}" + (f" ({self.names[i]})" if self.names else "")

    def state_dict(self) -> dict[str, Any]:
        return {"intervals": self.intervals, "missed": self.missed, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.intervals, self.missed = list(state["intervals"]), list(state["missed"])
        self.told = list(state["told"])
