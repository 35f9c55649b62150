"""Heads first: what the first phase trains, its settings and costs, and resuming in either."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from support.checkpoint_files import all_weights
from support.command import hubpath, refused, shown
from support.compare import QUIET, settings_of
from torch import nn
from training.random_kills import TIMES, contents

from hubpath_fast.baselines import SingleModel
from hubpath_fast.compare import compare
from hubpath_fast.compare.settings import CompareSettings
from hubpath_fast.data import TensorBatches, TensorSet
from hubpath_fast.hub import build_experts
from hubpath_fast.hub.source import PlainTask
from hubpath_fast.model.features import OnFeatures
from hubpath_fast.recipes.fit import fit
from hubpath_fast.runs.build import build_seeded
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.warm_up import (
    NumberStream,
    read_warm_up,
    warm_up_heads,
    warm_up_steps,
    warm_up_trainer,
)
from hubpath_fast.tasks import Classification
from hubpath_fast.training import (
    Reporting,
    SingleObjective,
    Trainer,
    TrainerConfig,
    head_parameters,
    load_weights,
    read_log,
)

IMAGES, BATCH, STEPS, PASSES = 20, 6, 9, 2
FIRST = PASSES * 4  # ceil(20 / 6) is 4
HUB = ["test_resnet", "test_resnet?freeze=body"]  # the same network twice
TASK = Classification(("a", "b", "c"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """10 images of each of two classes to train on, and 4 held out."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def config(data, **options):
    trainer = {
        "steps": STEPS, "batch_size": BATCH, "eval_every": 3, "save_every": 3, "log_every": 2,
        **options.pop("trainer", {}),
    }  # fmt: skip
    return FitConfig.from_dict(
        {
            "data": str(data), "hub": HUB, "pretrained": False, "image_size": 32, "workers": 0,
            "warm_up": f"heads:{PASSES}", "trainer": trainer, **options,
        }
    )  # fmt: skip


def held(out):
    """All that two equal runs have in common, the first phase's among it."""
    first = out / "warm-up"
    return {
        **contents(out),
        "result": {
            name: value
            for name, value in json.loads((out / "result.json").read_text()).items()
            if name not in {*TIMES, "warm_up_seconds"}
        },
        "first/model": all_weights(first / "last"),
        "first/log": [{**line, "time": None} for line in read_log(first / "log.jsonl")],
        "first/files": sorted(path.name for path in first.iterdir()),
    }


def assert_equal(found, expected):
    flat = [torch.utils._pytree.tree_flatten_with_path(state)[0] for state in (found, expected)]
    for (path, a), (other, b) in itertools.zip_longest(*flat):
        assert path == other
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit(config(data), out, console=QUIET)
    return out


class TestOneHead:
    """The first phase of a single network is plain linear probing."""

    N, CLASSES = 11, 3

    def run(self, out, dtype, **settings):
        torch.manual_seed(0)
        [expert] = build_experts(["test_resnet"], self.CLASSES, pretrained=False, input_size=32)
        model = SingleModel(expert).to(dtype)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
        images = torch.randint(256, (self.N, 3, 32, 32), dtype=torch.uint8)
        targets = torch.randint(self.CLASSES, (self.N,))
        settings = TrainerConfig(batch_size=4, seed=3, lr_head=0.1, steps=40, **settings)
        data = TensorSet(images, targets)
        quiet = Reporting(Console(quiet=True), tensorboard=False)
        trainer = Trainer(
            model, SingleObjective(TASK.loss), None, settings, out, task=TASK, reporting=quiet
        )
        before = {name: value.clone() for name, value in model.state_dict().items()}

        def first():
            return warm_up_heads(
                trainer, SingleObjective(TASK.loss), TensorBatches(data, 4), "heads:3", False
            )

        return model, images, targets, before, first

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_equals_a_plain_loop_to_the_bit(self, tmp_path, dtype):
        settings = {"optimizer": "sgd", "schedule": "constant", "weight_decay": 0.01}
        model, images, targets, before, first = self.run(tmp_path, dtype, **settings)
        body, head = model.module, nn.Linear(96, self.CLASSES).to(dtype)
        head.load_state_dict({n: before[f"module.fc.{n}"] for n in ("weight", "bias")})
        with torch.no_grad():
            body.eval()
            x = (images.to(dtype) / 255 - model.mean) / model.std
            features = torch.cat(
                [body.global_pool(body.forward_features(part)) for part in x.split(4)]
            )
            body.train()
        optimizer = torch.optim.SGD(
            head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=True
        )
        order = torch.cat(
            [
                NumberStream(self.N, 4, 3).order.permutation(epoch)
                for epoch in range(4)  # 9 steps of 4: three passes of 11 and a bit
            ]
        )
        for step in range(9):
            chosen = order[4 * step : 4 * step + 4]
            optimizer.zero_grad()
            F.cross_entropy(head(features[chosen]), targets[chosen]).backward()
            optimizer.step()
        result = first()
        assert (result.interrupted, result.forwards) == (False, self.N)
        assert torch.equal(model.module.fc.weight, head.weight)
        assert torch.equal(model.module.fc.bias, head.bias)
        assert not torch.equal(head.weight, before["module.fc.weight"])

    def test_bodies_and_their_statistics_stay_to_the_bit(self, tmp_path):
        model, *_, before, first = self.run(tmp_path, torch.float32)
        first()
        moved = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
        assert moved == ["module.fc.weight", "module.fc.bias"]
        assert model.training
        assert all(module.training for module in model.modules())


def test_the_first_phase_moves_heads_generator_and_aggregator_and_nothing_else(data, whole):
    chosen = config(data)
    before = build_seeded(chosen, PlainTask(2), 32)
    after = build_seeded(chosen, PlainTask(2), 32)
    load_weights(OnFeatures(after).trained, whole / "warm-up" / "last")
    own = after.state_dict()
    moved = {n for n, v in before.state_dict().items() if not torch.equal(v, own[n])}
    heads = {id(p) for expert in before.experts for p in head_parameters(expert)}
    expected = {
        name
        for name, p in before.named_parameters()
        if id(p) in heads or not name.startswith("experts.")
    }
    statistics = {name for name in moved if name not in dict(before.named_parameters())}
    assert moved - statistics == expected
    assert all(name.startswith("generator.") for name in statistics)
    log = read_log(whole / "warm-up" / "log.jsonl")
    assert [line["step"] for line in log] == [2, 4, 6, 8]
    assert set(log[0]["lr"]) == {"heads", "router"}


def test_the_second_phase_begins_with_the_weights_of_the_first(data, whole, tmp_path):
    """Its first losses are those of a model made by hand: the first step's batch and noise."""
    chosen, found = config(data, trainer={"log_every": 1}), {}
    step = Trainer._step

    def noted(self, *batch):
        if self.out_dir == tmp_path / "run" and not found:
            found.update({n: v.clone() for n, v in self.model.state_dict().items()})
        step(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", noted)
        fit(chosen, tmp_path / "run", console=QUIET)
    expected = build_seeded(chosen, PlainTask(2), 32)
    load_weights(OnFeatures(expected).trained, whole / "warm-up" / "last")
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


class PowerCut(Exception):
    pass


def cut(data, out, patch, at, how):
    """Runs until step ``at`` of both phases together is done; then stops, is stopped by a signal,
    or crashes. Of how many steps."""
    step, done = Trainer._step, []

    def counted(self, *batch):
        step(self, *batch)
        done.append(self.state.step)
        if len(done) == at:
            if how == "crash":
                raise PowerCut
            os.kill(os.getpid(), signal.SIGTERM) if how == "signal" else self.stop()

    patch.setattr(Trainer, "_step", counted)
    if how == "crash":
        with pytest.raises(PowerCut):
            fit(config(data), out, console=QUIET)
    else:
        result, summary = fit(config(data), out, console=QUIET)
        assert (result.interrupted, summary) == (True, {})
    patch.undo()
    return len(done)


@pytest.mark.parametrize(
    ("at", "how"),
    [
        (2, "crash"),  # before the first checkpoint of the first phase
        (5, "signal"), (5, "crash"),
        (FIRST, "stop"),  # the last step of the first phase, not yet logged
        (FIRST + 1, "crash"),  # the second phase has no checkpoint yet
        (FIRST + 1, "stop"), (FIRST + 4, "crash"), (FIRST + 5, "signal"),
    ],
)  # fmt: skip
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(
    data, whole, tmp_path, monkeypatch, at, how
):
    out = tmp_path / "run"
    assert cut(data, out, monkeypatch, at, how) == at
    torch.manual_seed(12345)  # the second process starts from anywhere
    looked = []
    see = OnFeatures.see
    monkeypatch.setattr(OnFeatures, "see", lambda self, x: (looked.append(len(x)), see(self, x))[1])
    result, _ = fit(config(data), out, resume=True, console=QUIET)
    assert not result.interrupted
    assert_equal(held(out), held(whole))
    # Features are computed again in the first phase, and not once it is done.
    assert sum(looked) == (IMAGES if at <= FIRST else 0)


def test_a_signal_while_features_are_computed_is_a_stop(data, whole, tmp_path, monkeypatch):
    out, see, console = tmp_path / "run", OnFeatures.see, Console(record=True, width=500)

    def signalled(self, images):
        os.kill(os.getpid(), signal.SIGTERM)
        return see(self, images)

    monkeypatch.setattr(OnFeatures, "see", signalled)
    result, summary = fit(config(data), out, console=console)
    assert (result.interrupted, result.steps, summary) == (True, 0, {})
    text = console.export_text()
    assert "Stopped by SIGTERM while features were computed. Go on with the same command" in text
    monkeypatch.undo()
    fit(config(data), out, resume=True, console=QUIET)
    assert_equal(held(out), held(whole))


def test_a_finished_run_is_not_trained_again(data, whole, monkeypatch):
    def step(*_):
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(Trainer, "_step", step)
    before = held(whole)
    fit(config(data), whole, resume=True, console=QUIET)
    assert_equal(held(whole), before)


def test_the_result_counts_a_forward_for_each_image_and_expert(whole):
    result = json.loads((whole / "result.json").read_text())
    assert result["warm_up_forwards"] == IMAGES * len(HUB)
    assert result["warm_up_seconds"] > 0
    assert result["steps"] == STEPS


@pytest.mark.parametrize(("router", "forwards"), [("expert:0", 3), ("network:test_vit", 2)])
def test_a_router_on_features_is_warmed_up_without_images(data, tmp_path, router, forwards):
    told = Console(file=io.StringIO(), width=200)
    fit(config(data, router=router), tmp_path, console=told)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["warm_up_forwards"] == IMAGES * forwards
    text = told.file.getvalue()
    assert f"features take {IMAGES * forwards} expert forwards and 0.0 MB of memory" in text


def test_the_console_says_it_in_a_line_and_the_run_is_read_as_ever(data, tmp_path):
    run = tmp_path / "run"
    out = hubpath(
        "fit", "--data", data, "--hub", ",".join(HUB), "--no-pretrained", "--image-size", 32,
        "--steps", STEPS, "--batch-size", BATCH, "--workers", 0, "--out", run,
        "--warm-up", "HEADS:02",
    ).stdout  # fmt: skip
    text = re.sub(r"\s+", " ", out)
    # Features of two networks, images of 32 x 32 x 3 as bytes.
    assert (
        "heads first, with the router, on features of the frozen bodies: heads:2, 8 steps over 20 "
        "images; features take 40 expert forwards and 0.1 MB of memory"
    ) in text
    assert json.loads((run / "fit.json").read_text())["config"]["warm_up"] == "heads:2"
    assert "test" in hubpath("evaluate", run).stdout or "val" in hubpath("evaluate", run).stdout
    hubpath("report", run)
    assert (run / "report" / "report.html").is_file()


def test_several_seeds_warm_up_each(data, tmp_path):
    arguments = [
        "fit", "--data", data, "--hub", ",".join(HUB), "--no-pretrained", "--image-size", 32,
        "--steps", STEPS, "--batch-size", BATCH, "--workers", 0, "--out", tmp_path / "run",
        "--seeds", "0,1",
    ]  # fmt: skip
    hubpath(*arguments, "--warm-up", "heads:1")
    one, two = (all_weights(tmp_path / f"run/seed-{seed}/warm-up/last") for seed in (0, 1))
    assert one != two
    assert "warm_up" in refused(*arguments, "--warm-up", "heads:2", "--resume")


class TestSettings:
    @pytest.mark.parametrize(
        "text", ["heads", "heads:", "heads:0", "heads:-1", "heads:1.5", "bodies:2", "", "heads:2 3"]
    )
    def test_anything_else_is_one_message(self, text, tmp_path):
        message = (
            "warm_up: expected heads:E, E passes over the training images, a whole number of at "
            f"least 1, such as heads:5, got {text!r}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            read_warm_up(text)
        given = ("--data", tmp_path, "--hub", "a,b", "--warm-up", text)
        assert message in refused("fit", *given).replace("\n", " ")
        assert message in refused("compare", *given).replace("\n", " ")

    def test_another_type_is_one_message(self, data):
        with pytest.raises(ValueError, match="warm_up: expected text, or None, got 3"):
            config(data, warm_up=3)

    def test_a_run_without_is_the_run_that_it_was(self, data):
        assert shown("--data", "x", "--hub", "a,b")["warm_up"] is None
        assert "warm_up" not in config(data, warm_up=None).identity()
        assert config(data).identity()["warm_up"] == f"heads:{PASSES}"

    def test_steps_are_those_of_whole_passes(self):
        settings = TrainerConfig(steps=9, batch_size=6)
        assert warm_up_steps("heads:2", 20, settings) == 8
        assert warm_up_steps("heads:2", 18, settings) == 6
        with pytest.raises(ValueError, match="fewer steps than the 9 of the run, got 9 "):
            warm_up_steps("heads:3", 18, settings)

    def test_the_schedule_is_the_runs_over_its_own_steps(self):
        run = TrainerConfig(
            steps=100, schedule="steps", milestones=(50, 51, 99), warmup_steps=10, patience=2,
            lr_head=0.3, seed=5, optimizer="sgd",
        )  # fmt: skip
        first = warm_up_trainer(run, 20)
        assert (first.steps, first.milestones, first.warmup_steps) == (20, (10,), 2)
        assert (first.schedule, first.patience, first.eval_every) == ("steps", None, 0)
        assert (first.lr_head, first.seed, first.optimizer) == (0.3, 5, "sgd")
        assert warm_up_trainer(run.replace(milestones=(99,)), 20).schedule == "constant"
        assert warm_up_trainer(TrainerConfig(steps=100), 20).warmup_steps is None


LONG = (
    "warm_up: expected fewer steps than the 9 of the run, got 12 (heads:3 over 20 images in "
    "batches of 6); take fewer passes or more steps"
)


def test_a_warm_up_longer_than_the_run_is_refused_before_anything_is_done(data, tmp_path):
    given = [
        "--data", data, "--hub", ",".join(HUB), "--no-pretrained", "--image-size", 32,
        "--steps", STEPS, "--batch-size", BATCH, "--warm-up", "heads:3",
    ]  # fmt: skip
    message = refused("fit", *given, "--out", tmp_path / "run").replace("\n", " ")
    assert LONG in message
    assert not (tmp_path / "run" / "fit.json").exists()
    message = refused("compare", *given, "--out", tmp_path / "comparison").replace("\n", " ")
    assert LONG in message


def test_features_that_do_not_fit_into_memory_are_one_message(tmp_path):
    model = TestOneHead().run(tmp_path, torch.float32)[0]
    data = TensorSet(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8).long())
    settings = TrainerConfig(steps=40, batch_size=4)
    trainer = Trainer(model, SingleObjective(TASK.loss), None, settings, tmp_path, task=TASK)
    arguments = trainer, SingleObjective(TASK.loss), TensorBatches(data, 4), "heads:1", False
    needed = 8 * 96 * 4
    with pytest.raises(ValueError, match=r"need 0.00 GiB of memory, more than half of the 0.00 "):
        warm_up_heads(*arguments, free=2 * needed - 1)
    warm_up_heads(*arguments, free=2 * needed)


def test_another_run_in_the_first_phases_folder_is_refused(data, tmp_path, monkeypatch):
    cut(data, tmp_path / "run", monkeypatch, 5, "stop")
    with pytest.raises(ValueError, match=r"warm-up' holds another run"):
        fit(config(data), tmp_path / "run", console=QUIET)
    with pytest.raises(
        ValueError, match=r"of another configuration \(.*run.fit.warm_up: 'heads:2'"
    ):
        fit(config(data, warm_up="heads:1"), tmp_path / "run", resume=True, console=QUIET)


def test_a_comparison_warms_up_every_head_and_counts_it(data, tmp_path):
    plain = settings_of(data, "test_resnet,test_resnet", steps=5)
    settings = CompareSettings.from_dict(plain.to_dict() | {
        "fit": {**plain.fit.to_dict(), "warm_up": "heads:1"},
    })  # fmt: skip
    out = tmp_path / "out"
    methods = "single,distill,zoo-tuning,hub-pathway,random-pathway"
    rows = compare(settings, methods, (0,), out, 1, QUIET)
    assert {row["status"] for row in rows} == {"done"}
    forwards = {
        run: json.loads((out / f"runs/seed-0/{run}/result.json").read_text())["warm_up_forwards"]
        for run in ("single-0", "distill", "zoo-tuning", "pathway", "random-pathway")
    }
    assert forwards == {
        "single-0": 20, "distill": 20, "zoo-tuning": 0, "pathway": 40, "random-pathway": 40,
    }  # fmt: skip
    # Updates of 8 images by experts for an image, and those of heads first.
    spent = {row["method"]: row["train_forwards"] for row in rows}
    assert spent["hub-pathway"] == 5 * 8 * 1 + 40
    assert spent["single:test_resnet #1"] == 5 * 8 + 20
    assert spent["distill"] == 5 * 8 * 3 + 20 + 2 * (5 * 8 + 20)
    folder = out / "runs/seed-0/single-0"
    result = json.loads((folder / "result.json").read_text())
    phases = [read_log(path / "log.jsonl")[-1] for path in (folder / "warm-up", folder)]
    assert [line["step"] for line in phases] == [3, 5]
    assert result["train_seconds"] > sum(line["time"]["seconds"] for line in phases) * 0.999
