"""The shelf's demo at its smallest: ten models of a few steps, every command, and the page."""

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console
from support.command import refused

from hubpath_fast.data import RENDERINGS
from hubpath_fast.features import Shelf
from hubpath_fast.recipes import shelf_demo as module
from hubpath_fast.recipes.shelf_demo import ShelfDemoSettings, shelf_demo
from hubpath_fast.shelf.add import NothingBetter
from hubpath_fast.shelf.digits import SnapshotSettings

FIT = ShelfDemoSettings().fit
SMALL = ShelfDemoSettings(
    networks=("test_byobnet",),
    snapshots=SnapshotSettings(taken=(2, 30)),
    newcomer="test_efficientnet",
    fit=dataclasses.replace(FIT, trainer=FIT.trainer.replace(steps=20, eval_every=10)),
)


def quiet():
    return Console(file=io.StringIO(), width=100)


def run(out, cache, console=None):
    return shelf_demo(out, settings=SMALL, console=console or quiet(), cache=cache)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo: its folder, its summary, what it printed, and its cache."""
    out, cache = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("cache")
    console = quiet()
    summary = run(out, cache, console)
    return out, summary, console.file.getvalue(), cache


def test_the_summary_is_what_the_commands_wrote(finished):
    out, summary, _, _ = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    compared = json.loads((out / "shelf/compare.json").read_text())
    test = {row["name"]: row["test"]["accuracy"] for row in compared["rows"] if row["test"]}
    assert summary["accuracy"] == test
    assert {"hub", "single", "static", "stacked", "oracle"} <= set(test)
    assert (summary["models"], summary["k"], summary["images"]) == (10, 2, 797)
    pruned = json.loads((out / "shelf/prune.json").read_text())
    assert summary["dropped"] == len(pruned["chosen"]["dropped"])
    assert list(summary["steps"]) == [
        "snapshots", "images", "extract", "rank", "fit", "compare", "prune", "add", "predict",
        "unfreeze",
    ]  # fmt: skip


def _read(finished):
    return (finished[0] / "report.html").read_text()


def test_the_shelf_is_of_all_snapshots_and_all_renderings(finished):
    shelf = Shelf.open(finished[0] / "shelf")
    names = [f"{rendering}-byobnet-{step}" for rendering in RENDERINGS for step in ("0002", "0030")]
    assert [label for label in shelf.labels if "byobnet" in label] == names
    assert shelf.record.sizes == (900, 600, 797)
    assert all(model.source_classes == 10 for model in shelf.models)


def test_predictions_from_files_are_those_of_the_features(finished):
    told = finished[1]["predict"]
    # fp16 features of the same pixels: what is as likely to rounding may change, no more.
    assert told["images"] - 4 <= told["same"] <= told["images"] == 797
    assert told["forwards"] == 2


def test_the_page_shows_the_numbers_in_a_sentence_each(finished):
    _, summary, _, _ = finished
    page = _read(finished)
    accuracy = summary["accuracy"]
    assert f"right on {100 * accuracy['hub']:.1f} %" in page
    assert f"right on {100 * accuracy['static']:.1f} %" in page
    for title in (
        "How good is it, and what does it cost?", "Which models are worth having?",
        "Who is asked?", "What can go?", "What can come?", "And then?",
    ):  # fmt: skip
        assert title in page
    assert page.count("<img ") == 5
    assert f"{summary['dropped']} of 10 models can go: {summary['dropped']} of its 10" in page
    assert "asked the same of all images would have 20 % there" in page
    assert f"{summary['pruned']['lost']:.1f} points lost" in page
    told = summary["predict"]
    said = "all" if told["same"] == told["images"] else str(told["same"])
    assert f"says of {said} of them the same class" in page


def test_the_page_writes_per_cent_and_intervals_one_way(finished):
    page = re.sub(r'"data:[^"]*"|<style.*?</style>', "", _read(finished), flags=re.DOTALL)
    assert re.findall(r"\d%", page) == []
    assert "95 % interval" in page
    assert re.findall(r">\s*interval\s*<", page) == []
    assert "kNN, %" in page


def test_one_that_was_stopped_goes_on_and_a_finished_one_is_replaced(finished):
    out, summary, _, cache = finished
    kept = out / "shelf/hub/result.json"
    before = kept.stat().st_mtime_ns
    (out / "summary.json").unlink()
    again = run(out, cache)
    assert kept.stat().st_mtime_ns == before
    assert again["accuracy"] == summary["accuracy"]
    assert again["tau"] == summary["tau"]


def test_only_a_newcomer_of_no_use_is_shown_as_refused(finished, tmp_path, monkeypatch):
    demo = module._Demo(tmp_path, SMALL, quiet(), finished[3])

    def refuses(error):
        def add(*_):
            raise error

        monkeypatch.setattr(module, "add", add)

    refuses(NothingBetter("makes nothing better"))
    assert demo._add()["reason"] == "makes nothing better"
    refuses(ValueError("shelf.json is damaged"))
    with pytest.raises(ValueError, match="damaged"):
        demo._add()


def test_a_folder_with_other_things_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"out: .*no demo \(thesis\.tex\)"):
        shelf_demo(tmp_path, console=quiet())
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_the_command_refuses_such_a_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    said = refused("shelf", "demo", "--out", tmp_path, "--seed", "1")
    assert "holds something that is no demo (thesis.tex)" in " ".join(said.split())
