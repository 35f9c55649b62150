"""Warnings about routing that has settled on one expert or one route, or never uses some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# An expert counts as idle after this many log intervals in a row without a row of its own, if an
# equal share would have brought it EXPECTED_ROWS by then.
IDLE_INTERVALS = 3
EXPECTED_ROWS = 32
# Evaluations have settled on one route where less than this share of the samples can be on others.
# Only there can a choice for each sample change a prediction: were it 20 points better on them, it
# would add a single point to the whole.
OTHER_ROUTES = 0.05
# In so many evaluations in a row: after the first steps scores hardly depend on the sample yet.
SETTLED_EVALUATIONS = 2


class RoutingCollapseWarning(UserWarning):
    """The routing uses (almost) one expert or one route, or never uses some."""


class CollapseWatch:
    """Says once that the mean routing has (almost) settled on one expert, once of each expert that
    it has had no rows for a long stretch, and once that evaluations send (almost) all samples to
    the same K experts."""

    def __init__(self, threshold: float, names: Sequence[str] | None = None) -> None:
        self.threshold, self.names = threshold, names
        self.intervals: list[int] = []  # [M] log intervals since the expert's last row
        self.missed: list[int] = []  # [M] rows that went to others meanwhile
        self.settled = 0  # evaluations in a row whose routes were (almost) one
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
        return self._new(found)

    def update_routes(self, routes: dict[str, Any], ends: bool) -> list[str]:
        """Likewise of an evaluation's ``routes``. ends: whether it is the run's last evaluation, of
        which one is enough."""
        share = routes["share"]
        count, k = len(share), round(sum(share))
        top = sorted(sorted(range(count), key=lambda i: -share[i])[:k])
        # A sample of another route than the top K's has at least one row elsewhere.
        others = sum(share) - sum(share[i] for i in top)
        self.settled = self.settled + 1 if count > k and others < OTHER_ROUTES else 0
        if not self.settled or (self.settled < SETTLED_EVALUATIONS and not ends):
            return []
        names = " and ".join(self.name(i) for i in top)
        part = f"at least {1 - others:.1%} of" if others else "all"
        return self._new(
            {
                "routes": f"the routing hardly depends on the sample: evaluated without noise, "
                f"{names} {'is' if k == 1 else 'are'} asked about {part} the "
                f"samples, though any {k} of {count} can be; load and entropy in the log do not "
                "show it, as they are of training, whose noise spreads the samples. Raise "
                "lr_router or the steps, or leave the other experts out"
            }
        )

    def _new(self, found: dict[str, str]) -> list[str]:
        """Of warnings by their keys, those that have not been given."""
        new = [key for key in found if key not in self.told]
        self.told += new
        return [found[key] for key in new]

    def name(self, i: int) -> str:
        return f"expert {i}" + (f" ({self.names[i]})" if self.names else "")

    def state_dict(self) -> dict[str, Any]:
        return {
            "intervals": self.intervals,
            "missed": self.missed,
            "settled": self.settled,
            "told": self.told,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.intervals, self.missed = list(state["intervals"]), list(state["missed"])
        self.settled = state.get("settled", 0)  # runs of earlier versions did not count it
        self.told = list(state["told"])
