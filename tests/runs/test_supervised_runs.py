"""``fit`` and ``compare`` with the router supervised: logged, resumed to the bit, and left out
where there is nothing to compare."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from support.command import hubpath, refused, shown
from support.images import check_resuming

from hubpath_fast.baselines import Noiseless, RandomGenerator, TaskGenerator
from hubpath_fast.compare.problems import DigitsProblem
from hubpath_fast.compare.runs import Context, pathway
from hubpath_fast.compare.settings import make_settings
from hubpath_fast.data import open_dataset
from hubpath_fast.hub.source import PlainTask
from hubpath_fast.runs.build import build_seeded, make_task, train_stream
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.folder import RunFolder
from hubpath_fast.runs.presets import preset
from hubpath_fast.tasks.settings import LossSettings
from hubpath_fast.training import PathwayObjective, Trainer

HUB = ["test_resnet", "test_efficientnet"]
ON = {"router_supervision": 0.3, "router_temperature": 0.5}
PARTS = ["step", "loss", "task", "explore", "exploit"]


def config(**options):
    trainer = {
        **preset("tiny")["trainer"], "steps": 4, "batch_size": 6, "accumulate": 3, "save_every": 0,
        "eval_every": 0, "milestones": [], "schedule": "constant", "log_every": 1,
    }  # fmt: skip
    return FitConfig.from_dict(
        {**preset("tiny"), "hub": HUB, "k": 2, **options, "trainer": trainer}
    )


@pytest.fixture(scope="module")
def splits():
    return open_dataset("digits", None, config().validation, 0)


def make(splits, chosen, folder, resume=False):
    task = make_task(chosen, splits)
    return Trainer(
        build_seeded(chosen, PlainTask(10), 32),
        PathwayObjective(task.criterion(chosen.explore, **chosen.supervision)),
        train_stream(splits.train, chosen, 32, 10),
        chosen.trainer,
        folder,
        task=task,
        resume=resume,
    )


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights(splits, tmp_path):
    chosen = config(**ON, label_smoothing=0.1)
    check_resuming(lambda folder, resume: make(splits, chosen, folder, resume), tmp_path, stop=2)


def test_the_log_has_its_own_key_where_it_is_on(splits, tmp_path):
    first = {}
    for name, options in {"on": ON, "off": {}}.items():
        records = make(splits, config(**options), tmp_path / name).fit().history
        first[name] = records[0]
        names = list(first[name])
        assert names[:5] == PARTS
        assert (names[5] == "router") == (name == "on")
        assert ("router" in first[name]) == (name == "on")
    # The same first step, but for what is added: 0.3 KL.
    assert first["on"]["router"] > 0
    added = first["on"]["loss"] - first["off"]["loss"]
    assert added == pytest.approx(0.3 * first["on"]["router"], abs=1e-5)


def test_off_a_run_counts_as_one_made_before_there_was_any():
    identity = FitConfig.from_dict(shown("--preset", "tiny")).identity()
    assert not any("router_s" in name or "router_t" in name for name in identity)
    identity = config(**ON).identity()
    assert (identity["router_supervision"], identity["router_temperature"]) == (0.3, 0.5)


def test_tasks_that_know_of_none_are_told_of_none():
    assert LossSettings().supervision == {}
    assert LossSettings(router_temperature=0.5).supervision == {}
    assert LossSettings(**ON).supervision == ON


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("router_supervision", -1, "router_supervision: expected a number of at least 0"),
        ("router_temperature", 0, "router_temperature: expected a number above 0"),
    ],
)
def test_wrong_settings_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        config(**{name: value})


def test_one_active_expert_is_a_sentence_before_anything_is_written(tmp_path):
    command = ["fit", "--preset", "tiny", "--hub", ",".join(HUB), "--out", tmp_path / "run"]
    on = ["--set", "router_supervision=0.5"]
    message = " ".join(refused(*command, "--k", 1, *on).split())
    assert (
        "router_supervision: expected 0 with k=1, got 0.5; with one active expert a sample has "
        "nothing to compare: set it to 0 or take a larger k"
    ) in message
    assert not (tmp_path / "run").exists()
    assert config(k=1).k == 1  # not supervised: as ever


def test_the_command_trains_with_it(tmp_path):
    command = ["fit", "--preset", "tiny", "--hub", ",".join(HUB), "--k", 2, "--steps", 2]
    on = ["--crops", 1, "--set", "router_supervision=0.5", "--set", "log_every=1"]
    hubpath(*command, *on, "--out", tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert all(0 < record["router"] < 10 for record in steps)
    assert RunFolder(tmp_path / "run").config().router_supervision == 0.5


class Asked(Context):
    """Keeps the objective instead of training with it."""

    def train(self, model, objective, groups=None):
        self.model, self.criterion = model, objective.criterion
        return model


@pytest.fixture(scope="module")
def problem():
    top = {"pretrained": False, "k": 2, **ON}
    return DigitsProblem(make_settings("digits", ",".join(HUB), quick=True, top=top), 0)


@pytest.mark.parametrize(
    ("options", "supervised"),
    [
        ({}, True),
        ({"explore": False}, True),
        ({"exploit": False}, True),
        ({"k": 1}, False),
        ({"generator": lambda m: RandomGenerator(len(m.experts), m.k)}, False),
        ({"generator": lambda m: TaskGenerator(len(m.experts))}, True),
        ({"generator": lambda m: Noiseless(m.generator)}, True),
    ],
    ids=["hub", "without explore", "without exploit", "K = 1", "random", "one route", "no noise"],
)
def test_a_comparison_supervises_what_can_be_taught(problem, options, supervised, tmp_path):
    context = Asked(problem, tmp_path, 1e-3, SimpleNamespace())
    pathway(context, **options)
    criterion, model = context.criterion, context.model.train()
    assert criterion.router_supervision == (0.3 if supervised else 0)
    images, y = torch.rand(6, 3, 32, 32), torch.arange(6)
    losses = criterion(model(images), y)
    assert (losses.router.item() > 0) == supervised
    losses.total.backward()  # a crash of nothing


def test_the_paper_does_without():
    for name in ("paper-homogeneous", "paper-heterogeneous"):
        assert not FitConfig.from_dict({**preset(name), "data": "/d"}).router_supervision
