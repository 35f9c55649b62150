"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

import torch

from .config import TrainerConfig

# One-cycle's ends, as shares of the peak rate (Smith & Topin 2019), as in torch's OneCycleLR.
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1 / 25 / 1e4
MOMENTUM_HIGH, MOMENTUM_LOW = 0.95, 0.85


def schedule_factor(config: TrainerConfig, step: int) -> float:
    """The share of the peak rate that update ``step`` (from 0) uses."""
    if config.schedule == "one-cycle":
        return _one_cycle(config, step, ONE_CYCLE_START, 1.0, ONE_CYCLE_END)
    warmup = config.warmup_steps or 0
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.schedule == "steps":
        return rise * config.decay ** sum(step >= m for m in config.milestones)
    if config.schedule == "cosine" and step >= warmup:
        share = (step - warmup) / max(1, config.steps - warmup)
        return _anneal(1.0, 0.0, share)
    return rise


def apply_schedule(optimizer: torch.optim.Optimizer, config: TrainerConfig, step: int) -> None:
    """Set every group's rate (its ``peak_lr`` times the factor), and where it cycles, SGD's
    momentum or AdamW's first beta."""
    factor = schedule_factor(config, step)
    momentum = _one_cycle(config, step, MOMENTUM_HIGH, MOMENTUM_LOW, MOMENTUM_HIGH)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        if not config.cycle_momentum:
            continue
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def _one_cycle(config: TrainerConfig, step: int, start: float, peak: float, end: float) -> float:
    warmup = 0.3 * config.steps if config.warmup_steps is None else config.warmup_steps
    top, last = max(0.0, warmup - 1), max(1.0, config.steps - 1)
    if step <= top:
        return _anneal(start, peak, step / top if top else 1.0)
    return _anneal(peak, end, min(1.0, (step - top) / (last - top)))


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
