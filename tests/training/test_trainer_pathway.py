"""The trainer with the project's own model, loss and stream, on small images."""

import copy
import math

import pytest
import torch
from support.graphs import assert_same
from support.training import before_step, crash, make, records
from torch import nn

from hubpath_fast.data import TensorSet, TensorStream
from hubpath_fast.model import HubPathway, PathwayGenerator
from hubpath_fast.tasks import Classification
from hubpath_fast.training import NonFiniteLoss, PathwayObjective, Reporting

M, C = 3, 2
TASK = Classification(("dark", "bright"))


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return TensorSet(pixels, pixels.float().mean((1, 2, 3)).gt(127.5).long(), ("dark", "bright"))


def expert():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, C),
    )  # fmt: skip


def trainer(out_dir, seed=0, **options):
    torch.manual_seed(seed)
    model = HubPathway(
        [expert() for _ in range(M)],
        PathwayGenerator(M, width=4, stride=2),
        k=2,
        normalization=(torch.full((M, 3), 0.5), torch.full((M, 3), 0.25)),
    )
    data, reporting = images(), Reporting(None, "", ["a", "b", "c"], False, False)
    return make(
        model, out_dir, TensorStream(data, 12, seed=1), PathwayObjective(TASK.criterion(0.5)),
        steps=10, batch_size=12, accumulate=2, lr_expert=3e-4, clip_norm=1.0, log_every=3,
        eval_every=5, save_every=4, task=TASK, validation=[(data.images, data.targets)],
        reporting=reporting, **options,
    )  # fmt: skip


@pytest.mark.parametrize("cut", [4, 7])
def test_a_crashed_run_resumes_to_the_bit(tmp_path, cut):
    whole = trainer(tmp_path / "whole")
    expected = whole.fit()
    with pytest.raises(RuntimeError, match="power cut"):
        before_step(trainer(tmp_path / "cut"), cut + 1, crash).fit()
    resumed = trainer(tmp_path / "cut", seed=5, resume=True)
    assert resumed.state.step == 4
    result = resumed.fit()
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert records(result) == records(expected)
    assert list(result.history[-1])[:9] == [
        "step", "loss", "task", "explore", "exploit", "grad_norm", "load", "mean_weight", "entropy",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::hubpath_fast.training.RoutingCollapseWarning")
def test_an_expert_without_rows_is_not_updated_at_all(tmp_path):
    """Neither decay nor momentum: a gradient of zero would bring both, and is not no gradient."""
    run = trainer(tmp_path)
    first, before = copy.deepcopy(run.model.experts[2]), []

    def leave_out(model):
        # Whatever the noise: the first two experts score highest from here on.
        model.generator.forward = lambda x: (
            torch.tensor([60.0, 30.0, -60.0]).expand(len(x), M), torch.zeros(len(x), M),
        )  # fmt: skip
        before.append(copy.deepcopy(model.experts[2]))

    before_step(run, 6, leave_out).fit()
    assert not torch.equal(before[0][0].weight, first[0].weight)  # it had rows before
    assert_same(run.model.experts[2].state_dict(), before[0].state_dict())


def test_groups_are_the_experts_and_the_router(tmp_path):
    groups = trainer(tmp_path).optimizer.param_groups
    assert [(g["name"], g["peak_lr"]) for g in groups] == [("experts", 3e-4), ("router", 3e-3)]


@pytest.mark.parametrize("part", ["experts", "generator"])
def test_nan_in_an_expert_or_in_the_scores_is_told_apart(tmp_path, part):
    def poison(model):
        parameter = next((model.experts[2] if part == "experts" else model.generator).parameters())
        parameter.fill_(math.nan)

    with pytest.raises(NonFiniteLoss) as info:
        before_step(trainer(tmp_path), 6, poison).fit()
    error = info.value
    assert (error.step, error.checkpoint) == (6, tmp_path / "last")
    assert error.experts == (["expert 2 (c)"] if part == "experts" else [])
    assert ("the generator's scores" in str(error)) == (part == "generator")
