"""What the log says about the steps since its last line.

Letters: M experts, P named loss parts, R rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parallel.collectives import sum_over
from ..parallel.ranks import Ranks
from .objective import Losses


class Record(NamedTuple):
    """One micro-batch."""

    step: int
    share: float  # of the step's samples
    values: Tensor  # [1 + P] losses, then [M] mean p, on the device
    counts: list[int] | Tensor | None  # rows of each expert; on the device: offsets [M + 1]
    rows: Tensor | None  # [R] a sum over each row's output: finite where the output is


class Bad(NamedTuple):
    """A step whose loss is not finite: its loss terms, the experts whose outputs are not finite (as
    far as known), and whether the routing is not."""

    step: int
    terms: dict[str, float]
    experts: list[int]
    router: bool


class StepWindow:
    """The micro-batches since the last line of the log, kept on the device until one is due.

    Reading a value on the host would make a GPU wait at every step, so nothing is read before the
    log needs it, counts neither where no executor has read them. Of several ranks each keeps its
    own samples' until then, and what is said and saved is of all.
    """

    def __init__(self, ranks: Ranks = Ranks()) -> None:
        self.ranks = ranks
        self._merged = 0  # records, the first ones, that are of all ranks already
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
            known = getattr(routing, "counts_known", True)  # a reference's has no other
            counts = list(routing.counts()) if known else routing.offsets
            if losses.expert_outputs is not None:
                rows = losses.expert_outputs.detach().flatten(1).sum(1, dtype=torch.float32)
        self.records.append(Record(step, share, torch.cat(values), counts, rows))

    def add_norm(self, norm: Tensor) -> None:
        self.norms.append(norm.detach())

    def summary(self) -> dict[str, Any]:
        """Means over the window, and the window emptied: losses, grad_norm, and of the routing
        load [M] (share of rows), mean_weight [M], entropy of the mean p (nats) and
        entropy_fraction (of log M). All ranks call it together."""
        self._merge()
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
        self.records, self.norms, self._merged = [], [], 0
        return result

    def first_bad(self) -> Bad | None:
        """The first step whose loss is not finite, on this rank; None when all is well. Waits for
        the device."""
        if not self.records:
            return None
        bad = (~torch.isfinite(self._values()[:, 0])).nonzero().flatten().tolist()
        if not bad:
            return None
        self._read_counts()
        record = self.records[bad[0]]
        values = record.values.cpu()
        terms = dict(zip(self.names, values.tolist(), strict=False))
        router = not bool(torch.isfinite(values[len(self.names) :]).all())
        experts: list[int] = []
        if record.rows is not None:
            ends = torch.tensor(record.counts).cumsum(0)
            rows = (~torch.isfinite(record.rows.cpu())).nonzero().flatten()
            experts = torch.searchsorted(ends, rows, right=True).unique().tolist()
        return Bad(record.step, terms, experts, router)

    def _read_counts(self) -> None:
        """Those that are on the device still, in one read."""
        late = [i for i, record in enumerate(self.records) if isinstance(record.counts, Tensor)]
        if late:
            offsets = torch.stack([self.records[i].counts for i in late])
            for i, counts in zip(late, offsets.diff(dim=1).tolist(), strict=True):
                self.records[i] = self.records[i]._replace(counts=counts)

    def _merge(self) -> None:
        """Makes the records those of all ranks, each weighted by its samples."""
        self._read_counts()
        own = self.records[self._merged :]
        if self.ranks.single or not own:
            return
        share = torch.tensor([record.share for record in own], dtype=torch.float64)
        values = torch.stack([record.values for record in own]).double().cpu()
        counts = torch.tensor([record.counts or [] for record in own], dtype=torch.float64)
        sums = torch.cat([share[:, None], share[:, None] * values, counts], dim=1)
        sum_over(sums, self.ranks, "log")
        share, means, counts = sums.split([1, values.shape[1], counts.shape[1]], dim=1)
        share = share.flatten()
        for i, record in enumerate(own):
            self.records[self._merged + i] = Record(
                record.step,
                float(share[i]),
                (means[i] / share[i]).to(record.values),
                None if record.counts is None else [round(n) for n in counts[i].tolist()],
                None,
            )
        self._merged = len(self.records)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. All ranks call it together."""
        self._merge()
        return {
            "names": self.names,
            "records": [[r.step, r.share, r.values.cpu(), r.counts] for r in self.records],
            "norms": [norm.cpu() for norm in self.norms],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.names = state["names"]
        self.records = [Record(s, w, v.to(device), c, None) for s, w, v, c in state["records"]]
        self.norms = [norm.to(device) for norm in state["norms"]]
        self._merged = len(self.records)

    def _values(self) -> Tensor:
        return torch.stack([record.values for record in self.records]).double().cpu()
