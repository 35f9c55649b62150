"""Schedules are pure functions here; torch's stateful ones are the truth they are held against."""

import pytest
import torch
from torch.optim import lr_scheduler

from hubpath_fast.training import TrainerConfig, apply_schedule, schedule_factor

STEPS = 20


def torch_rates(make, optimizer_type=torch.optim.SGD, key="lr", **options):
    optimizer = optimizer_type([torch.nn.Parameter(torch.zeros(1))], lr=1.0, **options)
    schedule = make(optimizer)
    rates = []
    for _ in range(STEPS):
        group = optimizer.param_groups[0]
        rates.append(group["betas"][0] if key == "betas" else group[key])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [None, 3, 10])
def test_one_cycle_equals_torchs_for_rates_and_momentum(warmup):
    share = 0.3 if warmup is None else warmup / STEPS

    def cycle(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=STEPS, pct_start=share)

    config = TrainerConfig(steps=STEPS, warmup_steps=warmup, cycle_momentum=True)
    parameter = torch.nn.Parameter(torch.zeros(1))
    group = {"params": [parameter], "lr": 1.0, "peak_lr": 1.0}
    adamw, sgd = torch.optim.AdamW([{**group}]), torch.optim.SGD([{**group}], momentum=0.9)
    rates, betas, momenta = [], [], []
    for step in range(STEPS):
        apply_schedule(adamw, config, step)
        apply_schedule(sgd, config, step)
        rates.append(sgd.param_groups[0]["lr"])
        betas.append(adamw.param_groups[0]["betas"][0])
        momenta.append(sgd.param_groups[0]["momentum"])
    # Both evaluate the same cosine in double precision, in another order of operations.
    assert rates == pytest.approx(torch_rates(cycle, momentum=0.9), abs=1e-12)
    assert momenta == pytest.approx(torch_rates(cycle, key="momentum", momentum=0.9), abs=1e-12)
    assert betas == pytest.approx(torch_rates(cycle, torch.optim.AdamW, "betas"), abs=1e-12)


def test_cosine_and_steps_equal_torchs():
    cosine = TrainerConfig(steps=STEPS, schedule="cosine")
    rates = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS))
    assert [schedule_factor(cosine, s) for s in range(STEPS)] == pytest.approx(rates, abs=1e-12)

    steps = TrainerConfig(steps=STEPS, schedule="steps", milestones=(6, 12))
    rates = torch_rates(lambda o: lr_scheduler.MultiStepLR(o, [6, 12], gamma=0.1))
    assert [schedule_factor(steps, s) for s in range(STEPS)] == pytest.approx(rates, abs=1e-12)


def test_a_warm_up_rises_linearly_to_the_full_rate():
    constant = TrainerConfig(steps=STEPS, schedule="constant", warmup_steps=4)
    assert [schedule_factor(constant, s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = TrainerConfig(steps=STEPS, schedule="cosine", warmup_steps=4)
    assert [schedule_factor(cosine, s) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert schedule_factor(cosine, 12) == pytest.approx(0.5)  # half-way between warm-up and end


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_finite_rates(steps):
    for schedule in ("one-cycle", "cosine", "constant"):
        config = TrainerConfig(steps=steps, schedule=schedule)
        assert all(0 <= schedule_factor(config, s) <= 1 for s in range(steps))
