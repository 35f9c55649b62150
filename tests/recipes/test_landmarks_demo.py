"""The landmarks demo at its smallest: what is in the files that it writes."""

import io
import json
import re

import pytest
from rich.console import Console

from hubpath_fast.data import RENDERINGS
from hubpath_fast.recipes.landmarks_demo import landmarks_demo, landmarks_demo_settings
from hubpath_fast.tasks.landmarks import LandmarkDigits, nme

# 3 steps, and a pass over each expert's 700 digits before.
FIT = landmarks_demo_settings().fit
SMALL = landmarks_demo_settings().replace(
    fit=FIT.replace(trainer=FIT.trainer.replace(steps=3)), digits_pretrain_epochs=1
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(its folder, its summary, what it printed)."""
    out, cache = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("cache")
    console = Console(file=io.StringIO(), width=100)
    summary = landmarks_demo(out, seed=0, settings=SMALL, console=console, cache=cache)
    return out, summary, console.file.getvalue()


def test_the_summary_has_the_promised_keys_and_is_on_disk(finished):
    out, summary, _ = finished
    assert set(summary) == {
        "mean_shape", "best_single", "best_single_in_hindsight", "ensemble", "ensemble_top_k",
        "hub_pathway", "oracle", "singles", "rates", "networks", "seconds", "pretrain_seconds",
        "seed", "k", "test_images",
    }  # fmt: skip
    assert list(summary["singles"]) == list(RENDERINGS)
    # Errors: the smallest is the best.
    assert summary["oracle"] <= min(summary["singles"].values()) <= summary["best_single"]
    assert summary["best_single_in_hindsight"] == min(summary["singles"].values())
    assert (summary["seed"], summary["k"], summary["test_images"]) == (0, 2, 797)
    assert json.loads((out / "summary.json").read_text()) == summary


def test_the_mean_shape_is_that_of_the_training_digits(finished):
    digits = LandmarkDigits(0, SMALL.digits_validation)
    targets, shape = digits.test.targets, digits.mean_shape()
    errors = nme(shape.expand(797, 5, 2), targets[..., :2], targets[:, 0, 3])
    assert finished[1]["mean_shape"] == errors.mean().item()


def test_the_table_and_the_page_show_the_same_numbers(finished):
    out, summary, printed = finished
    assert "hubpath landmarks demo: 200 digits in five renderings" in printed
    for title, key in (("mean shape", "mean_shape"), ("Hub-Pathway", "hub_pathway")):
        assert re.search(rf"{title} +│ +{100 * summary[key]:.2f} ", printed)
    page = (out / "report.html").read_text()
    assert f"is off by {100 * summary['hub_pathway']:.2f} % of a digit&#39;s diagonal" in page
    assert "Hub-Pathway on landmarks of handwritten digits" in page
    assert "from the landmarks of the target digits alone" in page
    assert page.count("<img ") >= 5


def test_what_is_no_demo_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"out: .*no demo \(thesis\.tex\)"):
        landmarks_demo(tmp_path, console=Console(quiet=True))
    assert (tmp_path / "thesis.tex").read_text() == "precious"
