"""What the log says about the steps since its last line, and about the routing.

Letters: M experts, P named loss parts, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .objective import Losses

# An expert counts as idle after this many log intervals in a row without a row of its own, if an
# equal share would have brought it EXPECTED_ROWS by then.
IDLE_INTERVALS = 3
EXPECTED_ROWS = 32


class RoutingCollapseWarning(UserWarning):
    """The routing uses (almost) one expert, or never uses some."""


class Record(NamedTuple):
    """One micro-batch."""

    step: int
    share: float  # of the step's samples
    values: Tensor  # [1 + P] losses, then [M] mean p, on the device
    counts: list[int] | None  # rows of each expert
    rows: Tensor | None  # [R] a sum over each row's output: finite where the output is


class StepWindow:
    """The micro-batches since the last line of the log, kept on the device until one is due.

    Reading a value on the host would make a GPU wait at every step, so nothing is read before the
    log needs it; the counts are on the host already.
    """

    def __init__(self) -> None:
        self.names: list[str] | None = None
        self.records: list[Record] = []
        self.norms: list[Tensor] = []

    def add(self, step: int, share: float, losses: Losses) -> None:
        """Take in one micro-batch; ``share`` is its part of the step's samples."""
        names = ["loss", *losses.parts]
        if self.names is not None and self.names != names:
            raise ValueError(f"the objective named its losses {names}, before {self.names}")
        self.names = names
        routing = losses.routing
        values = [value.detach().reshape(1) for value in (losses.total, *losses.parts.values())]
        counts = rows = None
        if routing is not None:
            values.append(routing.mean.detach())
            counts = list(routing.counts())
            if losses.expert_outputs is not None:
                rows = losses.expert_outputs.detach().flatten(1).sum(1, dtype=torch.float32)
        self.records.append(Record(step, share, torch.cat(values), counts, rows))

    def add_norm(self, norm: Tensor) -> None:
        self.norms.append(norm.detach())

    def summary(self) -> dict[str, Any]:
        """Means over the window, and the window emptied: losses, grad_norm, and of the routing
        load [M] (share of rows), mean_weight [M], entropy of the mean p (nats) and
        entropy_fraction (of log M)."""
        if not self.records:
            return {}
        values = self._values()
        share = torch.tensor([record.share for record in self.records], dtype=torch.float64)
        means = ((share[:, None] * values).sum(0) / share.sum()).tolist()
        result: dict[str, Any] = dict(zip(self.names, means, strict=False))
        if self.norms:
            result["grad_norm"] = float(torch.stack(self.norms).double().mean())
        if self.records[0].counts is not None:
            counts = torch.tensor([record.counts for record in self.records]).sum(0)
            p = torch.tensor(means[len(self.names) :], dtype=torch.float64)
            entropy = -float(torch.xlogy(p, p).sum())
            result |= {
                "rows": counts.tolist(),
                "load": (counts / counts.sum().clamp(min=1)).tolist(),
                "mean_weight": p.tolist(),
                "entropy": entropy,
                "entropy_fraction": entropy / math.log(len(p)) if len(p) > 1 else 1.0,
            }
        self.records, self.norms = [], []
        return result

    def first_bad(self) -> tuple[int, dict[str, float], list[int], bool] | None:
        """The first step whose loss is not finite, its loss terms, the experts whose outputs are
        not finite (as far as known), and whether the routing is not. None when all is well. Waits
        for the device."""
        if not self.records:
            return None
        bad = (~torch.isfinite(self._values()[:, 0])).nonzero().flatten().tolist()
        if not bad:
            return None
        record = self.records[bad[0]]
        values = record.values.cpu()
        terms = dict(zip(self.names, values.tolist(), strict=False))
        router = not bool(torch.isfinite(values[len(self.names) :]).all())
        experts: list[int] = []
        if record.rows is not None:
            ends = torch.tensor(record.counts).cumsum(0)
            rows = (~torch.isfinite(record.rows.cpu())).nonzero().flatten()
            experts = torch.searchsorted(ends, rows, right=True).unique().tolist()
        return record.step, terms, experts, router

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "records": [[r.step, r.share, r.values.cpu(), r.counts] for r in self.records],
            "norms": [norm.cpu() for norm in self.norms],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.names = state["names"]
        self.records = [Record(s, w, v.to(device), c, None) for s, w, v, c in state["records"]]
        self.norms = [norm.to(device) for norm in state["norms"]]

    def _values(self) -> Tensor:
        return torch.stack([record.values for record in self.records]).double().cpu()


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
        self.intervals, self.missed = (
            self.intervals or [0] * len(rows),
            self.missed or [0] * len(rows),
        )
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
