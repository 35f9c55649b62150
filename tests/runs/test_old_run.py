"""A run made by an earlier version (its commit: 78f8c81) opens, evaluates, resumes and reports.

tests/data_files/old_run.tar.xz holds it as SIGTERM left it after 15 of 30 steps:

    hubpath fit --preset tiny --dataset digits --k 1 --steps 30 --crops 1 --eval-every 30
        --hub test_resnet?freeze=body,test_convnext?freeze=body --set generator_width=2
        --save-every 15 --lr 0.3 --set trainer.log_every=5

and expected.json, the result.json of the same run without an interruption. Only that its frozen
weights are rounded to five values, which makes the archive small.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from support.command import hubpath, refused

from hubpath_fast.recipes.evaluate import evaluate
from hubpath_fast.runs.folder import RunFolder
from hubpath_fast.training import trainer

ARCHIVE = Path(__file__).parents[1] / "data_files" / "old_run.tar.xz"
# After 15 steps, as the earlier version evaluated it.
ACCURACY, LOSS, IMAGES = 78 / 797, 2.3193, 797

# Sums are rounded in another order by other processors and libraries: by 2^-24 of a loss near 2.3,
# 1.4e-7, for an operation, and steps carry that on. Between the instructions of SSE4.1 and AVX-512,
# and torch 2.11 and 2.14, losses moved by up to 4e-8. An image whose two likeliest classes are as
# close may then be decided otherwise.
LOSS_TOLERANCE, IMAGES_TOLERANCE = 1e-5, 1


@pytest.fixture
def old(tmp_path) -> Path:
    shutil.unpack_archive(ARCHIVE, tmp_path / "run", filter="data")
    return tmp_path / "run"


def test_it_opens_and_evaluates_as_it_did(old):
    config = RunFolder(old).record().config
    assert (config.k, config.trainer.steps, config.prefetch) == (1, 30, 4)
    assert (config.trainer.metric, config.trainer.metric_mode) == (None, None)
    scores = evaluate(old)
    assert scores["n"] == IMAGES
    assert scores["loss"] == pytest.approx(LOSS, abs=LOSS_TOLERANCE + 5e-5)  # of four decimals
    assert scores["accuracy"] == pytest.approx(ACCURACY, abs=IMAGES_TOLERANCE / IMAGES)


def test_it_resumes_ends_as_it_did_and_reports(old, monkeypatch):
    # Its noise came from torch's generator, whose state it kept; a run of today needs none.
    monkeypatch.setattr(trainer, "step_noise", lambda *step: contextlib.nullcontext())
    hubpath("fit", "--resume", "--out", old)
    expected = json.loads((old / "expected.json").read_text())
    result = RunFolder(old).result()
    assert set(result) == set(expected) | {"routes", "routing"}  # which it did not write
    for name in ("steps", "best_step", "seed", "test_images", "test_is_validation"):
        assert result[name] == expected[name]
    assert result["test_loss"] == pytest.approx(expected["test_loss"], abs=LOSS_TOLERANCE)
    share = IMAGES_TOLERANCE / IMAGES
    assert result["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=share)
    assert [line["step"] for line in RunFolder(old).history()] == [5, 10, 15, 20, 25, 30]
    hubpath("report", old)
    assert (old / "report" / "report.html").is_file()


def test_other_settings_are_refused_and_free_ones_are_not(old):
    arguments = ["fit", "--resume", "--out", old, "--set", "log_every=1"]
    changed = refused(*arguments, "--explore", "1")
    assert "run.fit.explore: 0.5 there, 1.0 now" in changed
    hubpath(*arguments)
