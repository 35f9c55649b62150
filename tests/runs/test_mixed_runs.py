"""``fit`` with mixup and cutmix: resumed to the bit, on either side's crops, smoothed once."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from support.command import hubpath, refused, shown
from support.images import check_resuming

from hubpath_fast.compare.problems import DigitsProblem
from hubpath_fast.compare.settings import make_settings
from hubpath_fast.data import open_dataset
from hubpath_fast.hub.source import PlainTask
from hubpath_fast.parallel import Ranks
from hubpath_fast.runs.build import build_seeded, make_task, train_stream
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.presets import preset
from hubpath_fast.training import PathwayObjective, Trainer

HUB = ["test_resnet", "test_efficientnet"]


def config(**options):
    trainer = {
        **preset("tiny")["trainer"], "steps": 4, "batch_size": 6, "accumulate": 3, "save_every": 0,
        "eval_every": 0, "milestones": [], "schedule": "constant", "log_every": 1,
    }  # fmt: skip
    values = {**preset("tiny"), "hub": HUB, "k": 1, "mixup": 0.2, "cutmix": 1.0}
    return FitConfig.from_dict({**values, **options, "trainer": trainer})


def stream(chosen, start=0, ranks=Ranks()):
    splits = open_dataset("digits", None, chosen.validation, 0)
    batches = train_stream(splits.train, chosen, 32, splits.num_classes, ranks).batches(start)
    return list(itertools.islice(batches, 2))


@pytest.mark.parametrize("augment", ["host", "device"])
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_ranks_have_parts_of_what_one_process_has(augment, mode):
    chosen = config(augment=augment, mixup_mode=mode, cutmix=0.5)
    whole = stream(chosen, 3)
    for rank in range(2):
        ranks = Ranks(rank, 2, 1, 2)
        own = ranks.share(chosen.trainer.accumulate).positions(chosen.trainer.batch_size)
        assert own.tolist() == [[0, 2, 4], [1, 3, 5]][rank]  # of each micro-batch of two its own
        for batch, part in zip(whole, stream(chosen, 3, ranks), strict=True):
            for values, found in zip(batch, part, strict=True):
                assert torch.equal(found, values[own])


@pytest.mark.parametrize("augment", ["host", "device"])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights(augment, tmp_path):
    chosen = config(augment=augment, label_smoothing=0.1)
    splits = open_dataset("digits", None, chosen.validation, 0)
    task = make_task(chosen, splits)

    def make(folder, resume):
        return Trainer(
            build_seeded(chosen, PlainTask(10), 32),
            PathwayObjective(task.criterion(chosen.explore)),
            train_stream(splits.train, chosen, 32, 10),
            chosen.trainer,
            folder,
            task=task,
            resume=resume,
        )

    check_resuming(make, tmp_path, stop=2)


@pytest.mark.parametrize("augment", ["host", "device"])
def test_batches_are_mixed_after_the_crops_and_hang_on_the_step_alone(augment):
    chosen = config(augment=augment)
    batches = stream(chosen)
    for images, targets in batches:
        assert images.dtype == targets.dtype == torch.float32
        assert images.shape == (6, 3, 32, 32)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        assert ((targets > 0).sum(dim=1) <= 2).all()
    later, _ = stream(chosen, start=1)[0]
    assert torch.equal(later, batches[1][0])
    plain = stream(config(augment=augment, mixup=0.0, cutmix=0.0))
    assert plain[0][0].dtype == torch.uint8
    never = stream(config(augment=augment, mixup_prob=0.0))
    assert torch.equal(never[0][0], plain[0][0].float() / 255)
    assert torch.equal(never[0][1].argmax(dim=1), plain[0][1])


def test_the_command_says_so_evaluates_on_classes_and_refuses_odd_batches(tmp_path):
    command = [
        "fit", "--preset", "tiny", "--hub", ",".join(HUB), "--k", 1, "--steps", 2, "--crops", 1,
        "--set", "mixup=0.2", "--set", "cutmix=1.0",
    ]  # fmt: skip
    out = hubpath(*command, "--batch-size", 8, "--out", tmp_path / "run").stdout
    assert "augment host, mixup 0.2, cutmix 1.0, " in out.replace("\n", " ")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 <= result["test_accuracy"] <= 1
    message = refused(*command, "--batch-size", 7, "--out", tmp_path / "odd")
    assert "batch_size: expected an even number with mixup or cutmix" in message.replace("\n", " ")
    assert not (tmp_path / "odd").exists()
    message = refused(*command, "--set", "mixup_mode=half", "--out", tmp_path / "odd")
    assert "mixup_mode: expected one of batch, pair, elem" in message.replace("\n", " ")


def test_runs_made_before_there_was_mixing_are_the_same_runs():
    values = shown("--preset", "tiny")
    identity = FitConfig.from_dict(values).identity()
    assert not any("mix" in name for name in identity)
    assert config().identity()["mixup"] == 0.2
    assert "mixup_mode" not in config().identity()


def test_a_comparison_mixes_for_all_methods():
    settings = make_settings(
        "digits", ",".join(HUB), quick=True, top={"pretrained": False, "k": 1, "mixup": 0.2}
    )
    problem = DigitsProblem(settings, 0)
    images, targets = problem.stream().batch(0)
    assert images.dtype == torch.float32
    assert targets.shape == (len(images), 10)
    outputs = torch.randn(len(images), 10, dtype=torch.float64)
    expected = -(targets * outputs.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(problem.task.loss(outputs, targets), expected)
