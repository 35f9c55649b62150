"""A run on classes of very different sizes: balanced accuracy in its log, its result, ``evaluate``
and the report, while accuracy goes on choosing the step."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from support.command import hubpath


@pytest.fixture
def folder(tmp_path):
    """Class a 20 images of a split, class b 3."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name, count in (("a", 20), ("b", 3)):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


def test_balanced_accuracy_goes_everywhere_accuracy_goes(folder, tmp_path):
    run = tmp_path / "run"
    out = hubpath(
        "fit", "--data", folder, "--hub", "test_resnet,test_efficientnet", "--k", 1,
        "--no-pretrained", "--image-size", 32, "--steps", 2, "--batch-size", 8, "--workers", 0,
        "--eval-every", 1, "--out", run,
    ).stdout  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    balanced = result["test_balanced_accuracy"]
    # Of 20 and 3 images; either share of right ones.
    assert any(balanced == pytest.approx((i / 20 + j / 3) / 2) for i in range(21) for j in range(4))
    text = re.sub(r"\s+", " ", out)
    assert f"of 23 images, balanced accuracy {100 * balanced:.1f} %, with the weights" in text
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all("balanced_accuracy" in line["validation"] for line in log if "validation" in line)
    best = max(line["validation"]["accuracy"] for line in log if "validation" in line)
    assert result["best_validation"] == best
    line = re.sub(r"\s+", " ", hubpath("evaluate", run).stdout)
    assert f"balanced accuracy {balanced:.4f}" in line
    hubpath("report", run)
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "the largest class has 20 samples, the smallest 3." in page
