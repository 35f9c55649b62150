"""``hubpath fit`` on several ranks: the run of one process, and what ranks are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console
from support.command import hubpath
from support.processes import connected, run_ranks

from hubpath_fast.checkpoints import SavedModel
from hubpath_fast.data import DigitsTask, write_image_folder
from hubpath_fast.locks import locked
from hubpath_fast.recipes.fit import fit
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.folder import RunFolder
from hubpath_fast.runs.on_ranks import check_alike, start_ranks
from hubpath_fast.training import TrainerConfig

SETTINGS = {
    "hub": ("test_resnet", "test_efficientnet", "test_byobnet"),
    "pretrained": False,
    "image_size": 32,
    "workers": 0,
    "flip": False,
    "channels_last": False,
}
TRAINER = {"steps": 4, "batch_size": 12, "eval_every": 2, "save_every": 2, "optimizer": "sgd"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(DigitsTask(0, 30), tmp_path_factory.mktemp("digits"), limit=30)


def config(folder, parallel=None, **changed):
    return FitConfig(
        data=str(folder), **SETTINGS, trainer=TrainerConfig(**{**TRAINER, **changed}),
        parallel=parallel,
    )  # fmt: skip


def fit_on_rank(rank, folder, out, parallel, resume=False, changed=()):
    """The result, or the error's kind and text."""
    console = Console(quiet=True)
    try:
        result, summary = fit(config(folder, parallel, **dict(changed)), out, resume, console)
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)
    return result.steps, summary


def weights(out):
    return SavedModel(out / "last").tensors()


def refusals(rank, folder):
    """What is said, on this rank, of settings that ranks refuse."""
    found = {}
    cases = {
        "batch": config(folder, "ep", batch_size=13),
        "idle": config(folder, "ep").replace(hub=("test_resnet",), k=1),
        "layout": config(folder, "3x2"),
        "warm-up": config(folder, "ep").replace(warm_up="heads:1"),
    }
    for name, settings in cases.items():
        try:
            start_ranks(settings)
        except ValueError as error:
            found[name] = str(error)
    settings = config(folder, "ep", seed=rank)
    try:
        check_alike(connected("ep"), settings, False)
    except ValueError as error:
        found["settings"] = str(error)
    return found


def on_two_ranks(rank, folder, place):
    """One run after another, in the same two processes, and what refusals say."""
    dp = fit_on_rank(rank, folder, place / "dp", "dp")
    ep = fit_on_rank(rank, folder, place / "goes on", "ep")
    with locked(place / "in use") if rank == 0 else nullcontext():
        in_use = fit_on_rank(rank, folder, place / "in use", "ep")
    return {"dp": dp, "goes on": ep, "in use": in_use, "refusals": refusals(rank, folder)}


def on_three_ranks(rank, folder, place):
    """A run, and one that two ranks began."""
    return {
        "ep": fit_on_rank(rank, folder, place / "ep", "ep"),
        "goes on": fit_on_rank(rank, folder, place / "goes on", "ep", True),
    }


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    """The runs' folders, and for two and for three ranks by name what each rank found."""
    place = tmp_path_factory.mktemp("runs")
    two = run_ranks(on_two_ranks, 2, place / "ranks", folder, place)
    (place / "goes on" / "result.json").unlink()  # as of a run that was killed before its end
    three = run_ranks(on_three_ranks, 3, place / "ranks", folder, place)
    return place, *({name: [f[name] for f in found] for name in found[0]} for found in (two, three))


@pytest.fixture(scope="module")
def runs(ranks, folder):
    """By their layout, the folders of the same run in one process and on ranks."""
    place, two, three = ranks
    found = {"one": fit(config(folder), place / "one", console=Console(quiet=True))[1]}
    for parallel, results, count in (("ep", three["ep"], 3), ("dp", two["dp"], 2)):
        found[parallel] = results[0][1]
        assert [steps for steps, _ in results] == [4] * count
        assert all(summary["test_loss"] == results[0][1]["test_loss"] for _, summary in results)
    return place, found


def test_ranks_leave_what_one_process_leaves(runs):
    place, _ = runs
    files = {path.relative_to(place / "one") for path in (place / "one").rglob("*")}
    there = {path.relative_to(place / "ep") for path in (place / "ep").rglob("*")}
    events = {path for path in files | there if "tfevents" in path.name}
    assert files - events == there - events
    for name in ("one", "ep"):
        record = json.loads((place / name / "last" / "config.json").read_text())
        assert len(record["model"]["experts"]) == 3
    lines = RunFolder(place / "ep").history()
    assert [line["step"] for line in lines] == [
        line["step"] for line in RunFolder(place / "one").history()
    ]


def test_experts_shared_out_learn_what_they_learn_in_one_process(runs):
    """In float32, four steps apart: sums in another order, of the router's gradients alone."""
    place, found = runs
    one, ep = weights(place / "one"), weights(place / "ep")
    assert one.keys() == ep.keys()
    for name in one:
        torch.testing.assert_close(ep[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
    assert found["ep"]["test_images"] == found["one"]["test_images"]
    assert found["ep"]["test_loss"] == pytest.approx(found["one"]["test_loss"], rel=1e-3)


def test_replicas_that_share_the_batch_train_the_same_hub(runs):
    place, found = runs
    assert weights(place / "dp").keys() == weights(place / "one").keys()
    assert found["dp"]["test_images"] == found["one"]["test_images"]


def test_a_run_of_ranks_is_opened_as_any_other(runs, folder):
    place, found = runs
    output = hubpath("evaluate", place / "ep").output
    accuracy = found["ep"]["test_accuracy"]
    assert f"accuracy {accuracy:.4f}" in output


def test_another_number_of_ranks_goes_on(ranks):
    place, two, three = ranks
    assert [steps for steps, _ in two["goes on"]] == [4] * 2
    assert [steps for steps, _ in three["goes on"]] == [4] * 3
    assert (place / "goes on" / "result.json").is_file()


def test_refusals_say_what_to_do(ranks):
    for found in ranks[1]["refusals"]:
        assert found["batch"].startswith("batch_size: expected a multiple of the 2 ranks, got 13")
        assert "rank 1 would be idle" in found["idle"]
        assert "--parallel dp" in found["idle"]
        assert "3 x 2 = 6" in found["layout"]
        assert found["warm-up"].startswith("warm_up: expected None on several ranks")
        assert found["settings"].startswith(
            "trainer.seed: expected the same on every rank, got '0' on rank 0 and '1' on rank 1"
        )


def test_a_folder_in_use_is_refused_on_every_rank(ranks):
    for kind, text in ranks[1]["in use"]:
        assert kind == "ValueError"
        assert "another run is at work" in text


def torchrun(*arguments, ranks=2):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), "-m", "hubpath_fast", *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_torchrun_starts_a_run_and_one_rank_speaks(folder, tmp_path):
    out = tmp_path / "run"
    done = torchrun(
        "fit", "--data", folder, "--hub", "test_resnet,test_efficientnet,test_byobnet",
        "--no-pretrained", "--image-size", 32, "--batch-size", 12, "--workers", 0, "--no-flip",
        "--steps", 2, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "result.json").is_file()
    assert done.stdout.count("kept in") == 1
    assert "ranks 2; experts by rank: 0: " in done.stdout
    assert "FutureWarning" not in done.stderr


def test_torchrun_of_another_command_is_refused_once():
    done = torchrun("predict", "nowhere", "nothing.png")
    assert done.returncode != 0
    assert done.stderr.count("2 processes were started of a command that is one") == 1
