"""Losses that are not finite, disks without room: what is named, and what is kept."""

import errno
import math
import os
from dataclasses import replace

import pytest
import torch
from support.training import (
    QUIET,
    VALIDATION,
    Stream,
    before_step,
    make,
    pathway,
    pathway_objective,
    single,
)

from hubpath_fast.training import Losses, NonFiniteLoss, load_state, load_weights
from hubpath_fast.training.step_window import StepWindow


def test_a_bad_expert_is_named_with_the_step_and_the_terms_and_the_checkpoint_is_kept(tmp_path):
    names = ["resnet", "swin", "convnext"]
    trainer = make(pathway(), tmp_path, save_every=4, reporting=replace(QUIET, expert_names=names))
    before_step(trainer, 7, lambda model: model.experts[1].head.weight.fill_(math.nan))
    with pytest.raises(NonFiniteLoss) as info:
        trainer.fit()
    error, last = info.value, tmp_path / "last"
    assert error.step == 7
    assert list(error.terms) == ["loss", "task", "explore", "exploit"]
    assert math.isnan(error.terms["task"])
    assert math.isfinite(error.terms["explore"])
    assert error.experts == ["expert 1 (swin)"]
    assert error.checkpoint == last
    for part in ("step 7 is not finite", "task nan", "expert 1 (swin)", str(last)):
        assert part in str(error)
    assert load_state(last)["run"]["step"] == 4
    weights = pathway(5)
    load_weights(weights, last)
    assert all(torch.isfinite(p).all() for p in weights.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_the_generator(tmp_path, value):
    trainer = make(pathway(), tmp_path)
    before_step(trainer, 3, lambda model: model.generator.heads.weight.fill_(value))
    with pytest.raises(NonFiniteLoss, match="the generator's scores; no checkpoint was written"):
        trainer.fit()
    assert not (tmp_path / "last").exists()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    """The loss is finite, its gradient is not: the square root's at zero."""

    def objective(model, x, y):
        zero = (model(x) * (0.0 if trainer.state.step == 5 else 1.0)).pow(2).sum(1)
        return Losses(zero.sqrt().mean())

    trainer = make(single(), tmp_path, objective=objective, save_every=2, log_every=100)
    with pytest.raises(NonFiniteLoss, match="a parameter is not finite after step 6"):
        trainer.fit()
    assert load_state(tmp_path / "last")["run"]["step"] == 4

    model = single()
    model.body[1].running_mean.fill_(math.nan)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # infinite by design
    trainer = make(model, tmp_path / "buffer", save_every=1)
    model.body[1].running_var.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="a buffer is not finite after step 1"):
        trainer.fit()


def test_without_reading_the_device_a_bad_step_is_still_found_at_the_next_line(tmp_path):
    """On a GPU losses are read at log lines only; the window must then find the step by itself."""
    window = StepWindow()
    model = pathway()
    for step in range(1, 5):
        x, y = Stream().batch(step)
        with torch.no_grad():
            if step == 3:
                model.experts[2].head.bias[0] = math.inf
            window.add(step, 1.0, pathway_objective(model, x, y))
    step, terms, experts, router = window.first_bad()
    assert (step, experts, router) == (3, [2], False)
    assert not math.isfinite(terms["loss"])


def test_no_room_for_a_checkpoint_says_so_and_the_run_can_go_on(tmp_path, monkeypatch):
    settings = {"save_every": 3, "eval_every": 100, "validation": VALIDATION}
    trainer = make(single(), tmp_path, **settings)
    save = torch.save

    def full(*args, **kwargs):
        if trainer.state.step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left .* previous checkpoint is whole"):
        trainer.fit()
    assert load_state(tmp_path / "last")["run"]["step"] == 3
    monkeypatch.undo()
    result = make(single(), tmp_path, resume=True, **settings).fit()
    whole = make(single(), tmp_path / "whole", **settings).fit()
    assert result.history[-1]["validation"] == whole.history[-1]["validation"]


def test_bad_arguments_of_the_trainer_are_named(tmp_path):
    with pytest.raises(ValueError, match="patience: expected None without validation"):
        make(single(), tmp_path, patience=2)
    with pytest.raises(ValueError, match="expert_names: expected 3, one for each expert, got 2"):
        make(pathway(), tmp_path, reporting=replace(QUIET, expert_names=["a", "b"]))
    with pytest.raises(ValueError, match=r"metric: expected one of accuracy, loss, n, got 'f1'"):
        make(single(), tmp_path / "f1", metric="f1", metric_mode="max", validation=VALIDATION).fit()
    with pytest.raises(ValueError, match="metric_mode: expected max or min with metric='loss'"):
        make(single(), tmp_path / "loss", metric="loss", validation=VALIDATION)
    with pytest.raises(ValueError, match="at least one sample to evaluate on"):
        make(single(), tmp_path / "empty", validation=[]).fit()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: torch sees no CUDA device, got 'cuda'"):
            make(single(), tmp_path, device="cuda")
