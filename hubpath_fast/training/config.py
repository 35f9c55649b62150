"""The trainer's settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..devices import read_device
from ..fields import Settings, setting


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Settings):
    """How a model is trained. Rates are the schedule's peak; steps count optimizer updates.

    The defaults are our choice for fine-tuning a few pre-trained networks: AdamW, one cycle, new
    parts faster.
    """

    steps: int = setting(2000, "optimizer updates", low=1)
    batch_size: int = setting(48, "samples in each update, over all its micro-batches", low=1)
    optimizer: str = setting("adamw", "what updates the weights", choices=("adamw", "sgd"))
    momentum: float = setting(0.9, "SGD's, or AdamW's first beta", low=0, high=1)
    nesterov: bool = setting(False, "of SGD's momentum")
    weight_decay: float = setting(0.01, "decoupled for AdamW", low=0)
    decay_bias_and_norm: bool = setting(
        True, "False spares parameters of at most one dimension: biases, normalisation scales"
    )
    lr_expert: float = setting(3e-4, "peak learning rate of the experts' bodies", low=0)
    lr_head: float | None = setting(
        1e-3, "peak learning rate of the experts' heads; None: lr_expert", low=0
    )
    lr_router: float = setting(
        3e-3, "peak learning rate of everything that is no expert: generator and aggregator", low=0
    )
    schedule: str = setting(
        "one-cycle",
        "one-cycle: cosine up over the warm-up, then down to 1/250,000 of the peak; cosine: down "
        "to 0; steps: times decay at every milestone",
        choices=("one-cycle", "steps", "cosine", "constant"),
    )
    warmup_steps: int | None = setting(
        None,
        "linear for all but one-cycle; None: 0.3 of the steps for one-cycle, none for the others",
        low=0,
    )
    milestones: tuple[int, ...] = setting((), "steps at which the rate falls, increasing", low=1)
    decay: float = setting(0.1, "factor of the rate at a milestone", low=0, high=1)
    cycle_momentum: bool = setting(
        False, "one-cycle moves momentum 0.95 -> 0.85 -> 0.95 against the rate"
    )
    clip_norm: float | None = setting(
        None,
        "largest norm of all gradients together; infinity only logs it, None does not compute it",
        above=0,
        finite=False,
    )
    accumulate: int = setting(
        1, "micro-batches that each batch is cut into: less memory, the same batch", low=1
    )
    amp: str = setting("none", "autocast", choices=("none", "bf16"))
    eval_every: int = setting(200, "steps between evaluations; 0: only after the last step", low=0)
    patience: int | None = setting(
        None, "evaluations without a better metric before training stops; None: never", low=1
    )
    metric: str | None = setting(
        None, "result of an evaluation that chooses the best step; None: the task's own metric"
    )
    metric_mode: str | None = setting(
        None, "which values of metric are better; None: as the task says", choices=("max", "min")
    )
    save_every: int = setting(
        200, "steps between checkpoints; 0: only at the end or when interrupted", low=0, free=True
    )
    log_every: int = setting(20, "steps that a line of the log averages over", low=1, free=True)
    collapse_entropy: float = setting(
        0.1, "warn when the mean routing's entropy falls below this share of log M", low=0, high=1
    )
    seed: int = setting(0, "random seed, of torch, numpy and Python", low=0)
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...", free=True, convert=str)

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Older files name the metric of the one task there was, which today is the default."""
        old = {"metric": "accuracy", "metric_mode": "max"}
        if all(values.get(name) == old[name] for name in old):
            return {name: values[name] for name in values if name not in old}
        return values

    def check(self) -> None:
        steps, points = self.steps, list(self.milestones)
        if any(a >= b for a, b in itertools.pairwise((*points, steps))):
            _refuse("milestones", f"increasing integers in 1..{steps - 1} (below steps)", points)
        if (self.schedule == "steps") != bool(points):
            got = f"{points} with schedule={self.schedule}"
            _refuse("milestones", "some with schedule=steps and none otherwise", got)
        if self.accumulate > self.batch_size:
            allowed = f"an integer in 1..{self.batch_size} (batch_size)"
            _refuse("accumulate", allowed, self.accumulate)
        if self.warmup_steps is not None and self.warmup_steps > steps:
            _refuse("warmup_steps", f"an integer in 0..{steps} (steps)", self.warmup_steps)
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            got = f"True with optimizer={self.optimizer}, momentum={self.momentum}"
            _refuse("nesterov", "False unless optimizer=sgd and momentum is above 0", got)
        if self.cycle_momentum and self.schedule != "one-cycle":
            got = f"True with schedule={self.schedule}"
            _refuse("cycle_momentum", "False unless schedule=one-cycle", got)
        if self.metric == "":
            _refuse("metric", "the name of a result, or None", "''")
        read_device(self.device)


def moved_milestones(milestones: Sequence[int], before: int, steps: int) -> list[int]:
    """Milestones of a training of ``before`` steps at the same shares of one of ``steps``."""
    moved = {round(milestone * steps / before) for milestone in milestones}
    return sorted(milestone for milestone in moved if 0 < milestone < steps)


def with_steps(trainer: TrainerConfig, steps: int) -> TrainerConfig:
    """The same training, longer or shorter: milestones and warm-up keep their share of it, and
    evaluations are as far apart as they were. One too short for its rate to fall is constant."""
    milestones, linear = moved_milestones(trainer.milestones, trainer.steps, steps), None
    if trainer.warmup_steps is not None:
        linear = round(trainer.warmup_steps * steps / trainer.steps)
    lost = trainer.milestones and not milestones
    return trainer.replace(
        steps=steps,
        milestones=milestones,
        schedule="constant" if lost else trainer.schedule,
        warmup_steps=linear,
    )


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")
