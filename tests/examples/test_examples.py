"""The examples run, are as short as they say, and learn what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from support.command import hubpath
from support.waiting import LIMIT

from hubpath_fast.data import DigitsTask
from hubpath_fast.recipes.predict import predict

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def start(*arguments: object) -> subprocess.Popen[str]:
    """Python with these arguments, on one thread, with the checkout's own package."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(*arguments: object) -> str:
    """What it prints to the end."""
    process = start(*arguments)
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, text
    return text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_under_60_lines(path):
    assert len(path.read_text().splitlines()) < 60


def test_own_loop():
    text = run(ROOT / "examples/own_loop.py", "--steps", 30)
    losses = [float(found) for found in re.findall(r"task ([\d.]+)", text)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 2.6  # log 10 is 2.3
    # Of 100 digits in ten classes, guessing gets 10 +- 3 right.
    assert float(re.search(r"validation accuracy ([\d.]+)", text)[1]) > 0.19


def test_own_experts():
    text = run(ROOT / "examples/own_experts.py", "--steps", 200)
    errors = [float(found) for found in re.findall(r"error ([\d.]+)", text)]
    assert errors[1] < errors[0] < 1  # 1 is the variance of a target
    rows = json.loads(re.findall(r"rows per expert (\[.*\])", text)[-1])
    assert len(rows) == 4
    assert sum(rows) == 2 * 256


def test_other_libraries():
    text = run(ROOT / "examples/other_libraries.py", "--steps", 12, "--decay", 0)
    found = dict(re.findall(r"(\w+): validation accuracy ([\d.]+)", text))
    assert list(found) == ["model", "timm", "torch"]
    assert len(set(found.values())) == 1  # without decay an average is its last model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ``hubpath fit`` on a few digits."""
    folder = tmp_path_factory.mktemp("service") / "run"
    options = ["--preset", "tiny", "--dataset", "digits", "--steps", 2, "--set", "crops=1"]
    hubpath("fit", *options, "--out", folder)
    return folder


def post(address: str, body: bytes) -> dict:
    with urllib.request.urlopen(address, body, timeout=LIMIT) as response:
        return json.load(response)


def test_service(trained, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(DigitsTask(seed=0).test.images[0, 0].numpy()).save(photo)
    process = start(ROOT / "examples/service.py", trained, "--port", 0)
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        answer = post(address, photo.read_bytes())
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            post(address, b"no image")
        assert "cannot identify image" in json.load(refused.value)["error"]
    finally:
        process.terminate()
        process.wait(timeout=LIMIT)

    [expected] = predict(trained, [photo])
    assert answer["label"] == expected.label
    # Sums of float32 may be in another order on another number of threads.
    assert answer["probability"] == pytest.approx(expected.probability, rel=1e-4)
    assert answer["experts"] == pytest.approx(expected.experts, rel=1e-4)
    assert len(answer["experts"]) == 2
