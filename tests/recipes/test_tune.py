"""`hubpath tune`: what it measures, what it decides, and what it leaves as it was."""

import gc
import hashlib
import itertools
import json
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from support.command import hubpath, refused
from support.faces import write_own
from support.source_trees import image
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import SequentialExecutor, Workload, remembered
from hubpath_fast.executors.graphs import GraphsExecutor
from hubpath_fast.recipes import tune
from hubpath_fast.recipes.tune import Bench, Spread, decide, draw_noise, shares
from hubpath_fast.runs.folder import RunFolder, open_run

HUB = ["--hub", "test_resnet,test_efficientnet,test_resnet", "--no-pretrained", "--workers", 0]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of three classes, in batches of 6."""
    root = tmp_path_factory.mktemp("tune")
    for name, i in itertools.product("abc", range(6)):
        image(root / "data" / name / f"{i}.png", (32, 32))
    more = ["--image-size", 32, "--batch-size", 6, "--steps", 2, "--clip-norm", 1]
    hubpath("fit", *HUB, "--data", root / "data", *more, "--out", root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def faces_run(tmp_path_factory):
    """Of three landmarks, in batches of 4."""
    root, rng = tmp_path_factory.mktemp("tune-faces"), np.random.default_rng(0)
    points = np.array([[30, 50], [70, 50], [50, 90]])
    write_own(root, [(f"{i}.jpg", points + rng.uniform(-8, 8, (3, 2))) for i in range(12)])
    more = ["--image-size", 64, "--head-width", 8, "--batch-size", 4, "--steps", 2]
    out = root / "run"
    hubpath("landmarks", "fit", *HUB, "--data", root / "faces.csv", *more, "--out", out)
    return out


@pytest.fixture
def two(monkeypatch):
    """Both executors of a CPU, on its one thread here."""
    monkeypatch.setattr(tune, "candidates", lambda device: ["sequential", "threads"])
    monkeypatch.setattr(tune, "MIN_ROUNDS", 3)
    monkeypatch.setattr(tune, "MIN_WARM_UPS", 1)


@pytest.fixture
def timed(two, monkeypatch):
    """timed(sequential=, threads=): from then on these are the milliseconds of a step."""
    times = {}

    def sample(bench, name, i):
        bench(name, i)
        return times[name] + 0.001 * (i % 3)

    monkeypatch.setattr(tune, "_sample", sample)
    return times.update


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_it_found_is_what_a_model_then_runs(run, tmp_path):
    """As a user does it, with two threads. Which is the fastest does not matter here."""
    code = (
        "import sys, torch\n"
        "from hubpath_fast.cli import app\n"
        "from hubpath_fast.executors import remembered\n"
        "from hubpath_fast.runs.folder import open_run\n"
        "app(['tune', sys.argv[1], '--seconds', '0.5'], standalone_mode=False)\n"
        "model = open_run(sys.argv[1]).model\n"
        "images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)\n"
        "for training in (True, False):\n"
        "    with torch.set_grad_enabled(training): model.train(training)(images)\n"
        "print(model.executor_report())\n"
        "print(*[m.executor for m in remembered.stored().measured])\n"
    )
    before = digests(run)
    environment = os.environ | {
        "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "XDG_CACHE_HOME": str(tmp_path)
    }  # fmt: skip
    output = subprocess.check_output(
        [sys.executable, "-c", code, str(run)], env=environment, text=True
    )
    assert "measuring training steps: sequential, threads" in output
    assert "training steps of 6 x 3 x 32 x 32 on " in output
    assert "predictions of 6 x 3 x 32 x 32 on " in output
    assert output.count("chosen") == 2
    assert str(tmp_path / "hubpath_fast" / "executors" / "measured.json") in output
    report = output[output.index("executor: ") :]
    training, predictions = report.splitlines()[-1].split()
    assert f"executor: {training} (asked for: auto)" in report
    assert " for 6 samples in `hubpath tune` on 20" in report
    assert " ms against " in report
    if predictions != training:
        assert f"predictions of 6 samples: {predictions} (1 steps), because " in report
    assert digests(run) == before


def test_the_fastest_is_remembered_and_followed(run, user_cache, timed):
    timed(sequential=10.0, threads=5.0)
    output = hubpath("tune", run, "--seconds", 0.1).output
    assert "executor=auto follows this from now on" in output
    found = {m.use: m for m in remembered.stored().measured}
    assert {use: m.executor for use, m in found.items()} == {
        "training": "threads", "predictions": "threads",
    }  # fmt: skip
    assert found["training"].milliseconds == {"sequential": 10.001, "threads": 5.001}
    model = open_run(run).model
    assert "it was the fastest for 6 samples" in model.executor_report().reasons[0]
    model.train()(torch.zeros(6, 3, 32, 32, dtype=torch.uint8))
    report = model.executor_report()
    assert report.executor == "threads"
    assert "5.001 ms against 10 ms (sequential)" in report.reasons[0]
    timed(sequential=4.0, threads=5.0)
    hubpath("tune", run, "--seconds", 0.1)
    assert [m.executor for m in remembered.stored().measured] == ["sequential"] * 2


def test_fit_says_which_it_takes_and_why(run, user_cache, timed, tmp_path):
    timed(sequential=10.0, threads=5.0)
    hubpath("tune", run, "--seconds", 0.1)
    data = RunFolder(run).record().config.data
    more = ["--image-size", 32, "--batch-size", 6, "--steps", 1]
    output = hubpath("fit", *HUB, "--data", data, *more, "--out", tmp_path / "again").output
    assert (
        "speed executor threads (it was the fastest for 6 samples in `hubpath tune` on " in output
    )
    other = hubpath("fit", *HUB, "--data", data, *more, "--k", 1, "--out", tmp_path / "k1").output
    assert "speed executor sequential (the experts are on cpu, and torch has one thread" in other


def test_a_run_of_landmarks_is_measured_at_another_size(faces_run, user_cache, timed):
    timed(sequential=1.0, threads=2.0)
    before = digests(faces_run)
    output = hubpath("tune", faces_run, "--seconds", 0.1, "--batch-size", 5).output
    assert "training steps of 5 x 3 x 64 x 64 on " in output
    assert {(m.samples, m.use, m.executor) for m in remembered.stored().measured} == {
        (5, "training", "sequential"), (5, "predictions", "sequential"),
    }  # fmt: skip
    assert digests(faces_run) == before


def test_what_was_found_is_forgotten_by_hub(run, faces_run, user_cache, timed):
    timed(sequential=1.0, threads=2.0)
    for each in (run, faces_run):
        hubpath("tune", each, "--seconds", 0.1)
    assert "2 measurements forgotten" in hubpath("tune", run, "--forget").output
    assert len(remembered.stored().measured) == 2
    assert "2 measurements forgotten" in hubpath("tune", "--forget").output
    assert "0 measurements forgotten" in hubpath("tune", "--forget").output


def test_the_settings_of_the_run_decide_what_is_measured(run, user_cache, timed, tmp_path):
    """Micro-batches, precision, and an executor that the run asks for."""
    timed(sequential=1.0, threads=2.0)
    data = RunFolder(run).record().config.data
    more = ["--image-size", 32, "--batch-size", 6, "--steps", 1, "--accumulate", 2, "--amp"]
    more += ["--set", "executor=sequential", "--set", "mixup=0.2"]
    hubpath("fit", *HUB, "--data", data, *more, "--out", tmp_path / "run")
    output = hubpath("tune", tmp_path / "run", "--seconds", 0.1).output
    assert "training steps of 3 x 3 x 32 x 32 in bfloat16 on " in output
    assert "predictions of 6 x 3 x 32 x 32 in bfloat16 on " in output
    assert "note the run asks for executor=sequential; executor=auto follows what was" in output


@pytest.mark.parametrize(
    ("times", "own", "chosen"),
    [
        ({"a": (9, 10, 11), "b": (4, 5, 6)}, "a", "b"),
        ({"a": (9, 10, 11), "b": (4, 5, 6)}, "b", "b"),
        ({"a": (9, 10, 11), "b": (8, 9, 10)}, "a", "a"),  # the middle halves overlap
        ({"a": (9, 10, 11), "b": (8, 8.5, 9)}, "a", "a"),  # touch
        ({"a": (9, 10, 11), "b": (8, 8.5, 8.9)}, "a", "b"),
        ({"a": (9, 10, 11), "b": (8, 9, 10)}, "c", "b"),  # the own one could not run
        ({"a": (9, 10, 11), "b": (1, 2, 3), "c": (2, 3, 4)}, "c", "c"),
    ],
)
def test_within_the_noise_auto_keeps_its_own_choice(times, own, chosen):
    spreads = {name: Spread(*three, p90=99.0) for name, three in times.items()}
    assert decide(spreads, own) == chosen


def test_a_spread_is_of_the_samples():
    assert Spread.of([float(i) for i in range(101)]) == Spread(25.0, 50.0, 75.0, 90.0)


def bench(run, gradients=True, seed=0):
    torch.manual_seed(seed)
    opened = open_run(run)
    config = tune._config(run, None, None)
    return Bench(opened, config, tune._work(config, 32)[tune.remembered.USES[not gradients]], [])


def test_steps_leave_the_weights_as_they_are_and_compute_all_gradients(run):
    one = bench(run)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    for i in range(3):
        one("sequential", i)
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    generator = one.model.generator.generator
    assert all(p.grad is not None for p in generator.parameters())
    assert sum(p.grad is not None for p in one.model.experts.parameters()) > 0
    assert one.model.executor_report().steps == 3


def test_predictions_compute_no_gradient(run):
    one = bench(run, gradients=False)
    one("sequential", 0)
    assert not one.model.training
    assert all(p.grad is None for p in one.model.parameters())


def test_experts_get_the_rows_that_they_had_in_the_run():
    share = [0.5, 0.3, 0.2, 0.0]
    noise = torch.cat(draw_noise(share, Workload(CPU, 100)))
    zero = torch.zeros_like(noise)
    routing = hp.functional.noisy_topk(zero, zero, 1, noise)
    counts = torch.tensor(routing.counts()) / len(noise)
    # 6,400 draws: the standard deviation of a share is at most 0.00625.
    torch.testing.assert_close(counts, torch.tensor(share), rtol=0, atol=0.025)
    again = torch.cat(draw_noise(share, Workload(CPU, 100)))
    assert torch.equal(noise, again)


@pytest.mark.parametrize("gradients", [True, False])
def test_routes_are_those_that_were_drawn_whatever_the_router_says(run, gradients, monkeypatch):
    one, seen = bench(run, gradients), []
    for head in (one.model.generator.generator.clean, one.model.generator.generator.noise):
        nn.init.normal_(head.weight, std=10.0)
    route = one.model.route

    def spy(*arguments, **more):
        seen.append(route(*arguments, **more))
        return seen[-1]

    monkeypatch.setattr(one.model, "route", spy)
    for i in range(4):
        one("sequential", i)
    for routing, eps in zip(seen, one._eps, strict=False):
        assert torch.equal(routing.experts.sort(1).values, eps.topk(2).indices.sort(1).values)


@pytest.mark.parametrize(
    ("history", "training", "expected"),
    [
        ([], True, [0.5, 0.5]),
        ([{"step": 1}], True, [0.5, 0.5]),
        ([{"load": [0.8, 0.2]}, {"load": [0.6, 0.4]}, {"step": 3}], True, [0.6, 0.4]),
        ([{"load": [0.6, 0.4], "routes": {"share": [1.0, 0.0]}}], True, [0.6, 0.4]),
        ([{"load": [0.6, 0.4], "routes": {"share": [1.5, 0.5]}}], False, [0.75, 0.25]),
        ([{"load": [0.6, 0.4]}], False, [0.6, 0.4]),
        ([{"load": [0.6, 0.2, 0.2]}, 3], True, [0.5, 0.5]),  # of another hub
    ],
)
def test_the_log_tells_the_shares(history, training, expected):
    assert shares(history, 2, training) == pytest.approx(expected)


def test_an_executor_that_runs_out_of_memory_is_left_out(run, user_cache, two, monkeypatch):
    step = Bench.__call__

    def failing(self, name, i):
        if name == "threads" and self.work.gradients:
            raise torch.OutOfMemoryError("no more")
        step(self, name, i)

    monkeypatch.setattr(Bench, "__call__", failing)
    output = hubpath("tune", run, "--seconds", 0.1).output
    assert "note threads: the memory of cpu does not suffice for training" in output
    assert {m.use for m in remembered.stored().measured} == {"predictions"}


def test_memory_that_runs_out_in_the_middle_leaves_an_executor_out(
    run, user_cache, two, monkeypatch
):
    step, calls = Bench.__call__, []
    monkeypatch.setattr(tune, "ROUTES", 1)  # so many steps warm up

    def failing(self, name, i):
        if name == "threads" and self.work.gradients:
            calls.append(i)
            if len(calls) == 3:  # after the warm-up, and a sample
                raise torch.OutOfMemoryError("no more")
        step(self, name, i)

    monkeypatch.setattr(Bench, "__call__", failing)
    output = hubpath("tune", run, "--seconds", 0.1).output
    assert output.count("note threads: the memory of cpu does not suffice for training") == 1
    assert "no executor could run" not in output
    assert len(calls) == 3
    assert {m.use for m in remembered.stored().measured} == {"predictions"}


def test_where_nothing_can_run_it_says_so(run, user_cache, two, monkeypatch):
    step, uses = Bench.__call__, {"training"}

    def failing(self, name, i):
        if self.work.use in uses:
            raise torch.OutOfMemoryError("no more")
        step(self, name, i)

    monkeypatch.setattr(Bench, "__call__", failing)
    output = hubpath("tune", run, "--seconds", 0.1).output
    assert "note no executor could run training: nothing is remembered of it" in output
    assert {m.use for m in remembered.stored().measured} == {"predictions"}
    uses.add("predictions")
    said = refused("tune", run, "--seconds", 0.1)
    assert "batch_size: no executor could run batches of 6 (sequential: the memory of cpu " in said
    assert "take a smaller one" in said


def test_what_is_left_out_is_let_go(run):
    one = bench(run)
    one("sequential", 0)
    held = weakref.ref(one._executors["sequential"])
    one.drop("sequential")
    gc.collect()
    assert held() is None
    assert all(p.grad is None for p in one.model.parameters())
    one("sequential", 1)


def test_a_choice_that_is_not_the_fastest_says_why(run, user_cache, two, monkeypatch):
    times = {"sequential": 10_090.0, "threads": 10_080.0}
    monkeypatch.setattr(
        tune, "_sample", lambda bench, name, i: bench(name, i) or times[name] + 20 * (i % 3)
    )
    output = hubpath("tune", run, "--seconds", 0.1).output
    assert output.count("sequential is within the noise of threads: auto's own choice") == 2
    assert "10,110" in output
    assert "e+04" not in output
    assert (
        "no other was faster beyond the noise" in open_run(run).model.executor_report().reasons[0]
    )
    times["threads"] = 1000.0
    assert "within the noise" not in hubpath("tune", run, "--seconds", 0.1).output


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (10090.4, "10,090"),
        (1000.0, "1,000"),
        (999.4, "999.4"),
        (12.345, "12.35"),
        (0.01234, "0.01234"),
    ],
)
def test_times_are_written_out(milliseconds, text):
    assert remembered.in_digits(milliseconds) == text


def test_graphs_that_do_not_fit_are_left_out(run, user_cache, two, monkeypatch):
    class Large(GraphsExecutor):
        obstacle = "graphs would need 31 GiB, and may hold 24"
        run, scores = SequentialExecutor.run, SequentialExecutor.scores

    made = {"sequential": SequentialExecutor, "threads": Large}
    monkeypatch.setattr(tune, "make_executor", lambda name: made[name]())
    output = hubpath("tune", run, "--seconds", 0.1).output
    assert "not measured in predictions, since graphs would need 31 GiB, and may hold 24" in output
    assert not remembered.stored().measured
    assert "from now on" not in output


def test_one_executor_is_nothing_to_choose_from(run):
    said = refused("tune", run)
    assert "device: on cpu with one thread experts run one after another in any case" in said
    assert tune.candidates(torch.device("cuda")) == ["sequential", "streams", "graphs"]
    with pytest.raises(ValueError, match="device: on mps experts run one after another"):
        tune.candidates(torch.device("mps"))


def test_what_is_no_run_is_refused(tmp_path, run):
    assert "holds no run of `hubpath fit`" in refused("tune", tmp_path / "none")
    assert "expected the folder of a run, or --forget" in refused("tune")
    assert "torch sees no CUDA device" in refused("tune", run, "--device", "cuda")
    assert "device: expected cpu, cuda" in refused("tune", run, "--device", "tpu9")


def test_an_unfinished_run_is_refused(tmp_path, run, two):
    (tmp_path / "fit.json").write_bytes((run / "fit.json").read_bytes())
    assert "has no checkpoint yet; finish the run with --resume" in refused("tune", tmp_path)


def test_a_run_of_a_game_is_refused(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "config.json").write_text(json.dumps({"atari": {"game": "pong"}}))
    said = refused("tune", tmp_path)
    assert "is a run of `hubpath atari`, whose steps are captured as they are or not at all" in said
    assert "`hubpath atari`" in refused("tune", tmp_path, "--forget")


def test_a_router_that_must_not_be_captured_still_says_so():
    scores = nn.Linear(3, 2)
    assert tune.Indifferent(scores).not_captured is None
    scores.not_captured = "it reads an expert"
    assert tune.Indifferent(scores).not_captured == "it reads an expert"
