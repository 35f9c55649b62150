"""The trainer's settings: one frozen dataclass that checks itself and goes to JSON and back."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("one-cycle", "steps", "cosine", "constant")
PRECISIONS = ("none", "bf16")
MODES = (None, "max", "min")

# What may differ between a checkpoint and the run that resumes it: where it runs and how often it
# reports and saves. Everything else changes the result.
FREE_KEYS = frozenset({"device", "log_every", "save_every"})


@dataclass(frozen=True)
class TrainerConfig:
    """How a model is trained. Rates are the schedule's peak; steps count optimizer updates.

    steps, batch_size: optimizer updates, and samples in each (over all micro-batches).
    optimizer: "adamw" or "sgd"; momentum is SGD's, or AdamW's first beta; nesterov is SGD's.
    weight_decay: decoupled for AdamW; decay_bias_and_norm=False spares parameters of at most one
        dimension (biases, normalisation scales).
    lr_expert, lr_head, lr_router: experts' bodies, their heads (None: lr_expert), and everything
        that is no expert (generator and aggregator).
    schedule: "one-cycle" (cosine up over the warm-up, then down to 1/250,000 of the peak),
        "cosine" (down to 0), "steps" (times decay at every milestone) or "constant". warmup_steps:
        linear for all but one-cycle; None means 0.3 of the steps for one-cycle and none for the
        others. cycle_momentum: one-cycle moves momentum 0.95 -> 0.85 -> 0.95 against the rate.
    clip_norm: largest norm of all gradients together; None neither clips nor computes the norm.
    accumulate: micro-batches that each batch is cut into (memory falls, the batch stays).
    amp: "none" or "bf16" (autocast).
    eval_every: steps between evaluations (0: only after the last step).
    patience: evaluations without a better metric before training stops (None: never).
    metric, metric_mode: the result of an evaluation that chooses the best step, and "max" or "min";
        None: the task's own metric.
    save_every: steps between checkpoints (0: only at the end or when interrupted).
    log_every: steps that one line of the log averages over.
    collapse_entropy: warn when the entropy of the mean routing falls below this share of log M.
    seed, device: of torch, numpy and Python; anything torch.device takes.
    """

    steps: int = 1000
    batch_size: int = 48
    optimizer: str = "adamw"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.01
    decay_bias_and_norm: bool = True
    lr_expert: float = 1e-3
    lr_head: float | None = None
    lr_router: float = 3e-3
    schedule: str = "one-cycle"
    warmup_steps: int | None = None
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    cycle_momentum: bool = False
    clip_norm: float | None = None
    accumulate: int = 1
    amp: str = "none"
    eval_every: int = 0
    patience: int | None = None
    metric: str | None = None
    metric_mode: str | None = None
    save_every: int = 500
    log_every: int = 20
    collapse_entropy: float = 0.1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(self.device))
        if isinstance(self.milestones, (list, tuple)):
            object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            self._whole(name, 1)
        for name in ("eval_every", "save_every", "seed"):
            self._whole(name, 0)
        for name in ("warmup_steps", "patience"):
            if getattr(self, name) is not None:
                self._whole(name, 1 if name == "patience" else 0)
        for name in ("lr_expert", "lr_router", "weight_decay"):
            self._real(name, 0, math.inf)
        if self.lr_head is not None:
            self._real("lr_head", 0, math.inf)
        for name in ("momentum", "decay", "collapse_entropy"):
            self._real(name, 0, 1)
        for name in ("nesterov", "decay_bias_and_norm", "cycle_momentum"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("amp", PRECISIONS),
            ("metric_mode", MODES),
        ):
            self._require(
                name, getattr(self, name) in allowed, f"one of {', '.join(map(str, allowed))}"
            )
        self._require(
            "metric",
            self.metric is None or (isinstance(self.metric, str) and self.metric != ""),
            "the name of one result of the evaluation, or None",
        )
        if self.clip_norm is not None:
            ok = _is_real(self.clip_norm) and self.clip_norm > 0  # inf: log the norm, never clip
            self._require("clip_norm", ok, "a number above 0, or None")
        self._check_combinations()

    def _check_combinations(self) -> None:
        points = self.milestones
        self._require(
            "milestones",
            isinstance(points, tuple)
            and all(_is_whole(m) and 0 < m < self.steps for m in points)
            and all(a < b for a, b in itertools.pairwise(points)),
            f"increasing whole numbers between 1 and {self.steps - 1} (steps is {self.steps})",
        )
        if (self.schedule == "steps") != bool(points):
            raise ValueError(
                f"schedule={self.schedule!r} with milestones={points}: milestones belong to "
                'schedule="steps", which needs at least one; give both or neither'
            )
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate={self.accumulate} cuts a batch of batch_size={self.batch_size} into "
                "more micro-batches than it has samples; lower accumulate or raise batch_size"
            )
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is longer than steps={self.steps}; "
                "lower warmup_steps"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov=True with optimizer={self.optimizer!r}, momentum={self.momentum}: it "
                'needs optimizer="sgd" and a momentum above 0; set them or nesterov=False'
            )
        if self.cycle_momentum and self.schedule != "one-cycle":
            raise ValueError(
                f"cycle_momentum=True with schedule={self.schedule!r}: it belongs to "
                'schedule="one-cycle"; set that or cycle_momentum=False'
            )
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(
                f"device={self.device!r} is none that torch knows ({str(error).splitlines()[0]}); "
                "use cpu, cuda or cuda:0"
            ) from error

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {allowed}")

    def _whole(self, name: str, low: int) -> None:
        value = getattr(self, name)
        self._require(name, _is_whole(value) and value >= low, f"a whole number of at least {low}")

    def _real(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        ok = _is_real(value) and math.isfinite(value) and low <= value <= high
        limits = f"of at least {low}" if high == math.inf else f"between {low} and {high}"
        self._require(name, ok, f"a number {limits}")

    def replace(self, **changes: Any) -> TrainerConfig:
        """A copy with some settings changed, checked again."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as JSON takes them."""
        values = dataclasses.asdict(self)
        values["milestones"] = list(self.milestones)
        return values

    def identity(self) -> dict[str, Any]:
        """The settings that change a result: a run can be resumed with others different."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE_KEYS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainerConfig:
        """The inverse of :meth:`to_dict`; an unknown key is a ValueError with the closest names."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
                hint = f"closest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
                raise ValueError(f"unknown training setting {key!r}; {hint}")
        return cls(**values)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
