"""The same images, stored plainly and in every awkward way, are the same to every command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import hubpath, refused
from typer.testing import CliRunner

from hubpath_fast.checkpoints import SavedModel
from hubpath_fast.cli import app

FIT = ["fit", "--hub", "test_resnet,test_resnet", "--no-pretrained", "--image-size", "32",
       "--batch-size", "8", "--steps", "2", "--set", "trainer.eval_every=0"]  # fmt: skip


def turned(grey, path):
    """Lying, with EXIF's word on how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def deep(grey, path):
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path)


def cut_out(grey, path):
    """White where it is transparent, over noise."""
    pixels = np.asarray(grey)
    noise = np.random.RandomState(0).randint(0, 255, pixels.shape, np.uint8)
    clear = pixels == 255
    channels = [np.where(clear, noise, pixels), np.where(clear, 0, 255).astype(np.uint8)]
    Image.merge("LA", [Image.fromarray(channel) for channel in channels]).save(path)


def floating(grey, path):
    Image.fromarray(np.asarray(grey) / np.float32(255)).save(path.with_suffix(".tif"))


def palette(grey, path):
    grey.convert("P").save(path)


AWKWARD = (turned, deep, cut_out, floating, palette)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(plain, awkward): 2 classes of 10 images to train on and 5 to test on."""
    root, random = tmp_path_factory.mktemp("read"), np.random.RandomState(0)
    for part, count in (("train", 10), ("test", 5)):
        for label in ("a", "b"):
            for i in range(count):
                levels = random.randint(0, 256, (24, 40)).astype(np.uint8)
                levels[:8, :9] = 255
                grey, name = Image.fromarray(levels), f"{part}/{label}/{i}.png"
                for kind in ("plain", "awkward"):
                    (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
                grey.convert("RGB").save(root / "plain" / name)
                AWKWARD[i % len(AWKWARD)](grey, root / "awkward" / name)
    return root / "plain", root / "awkward"


def fitted(folder, out, *options):
    hubpath(*FIT, "--data", folder, "--out", out, *options)
    result = json.loads((out / "result.json").read_text())
    return SavedModel(out / "best").tensors(), result["test_loss"]


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """(a run on the plain folder, its weights, its loss on the test images)."""
    out = tmp_path_factory.mktemp("run") / "run"
    return out, *fitted(folders[0], out, "--workers", 0)


@pytest.mark.parametrize(
    ("cache", "workers"), [("none", 0), ("none", 1), ("memory", 0), ("disk", 0)]
)
def test_fit_learns_the_same_of_them(folders, run, tmp_path, cache, workers):
    _, expected, loss = run
    options = ["--cache", cache, "--cache-dir", tmp_path / "cache", "--workers", workers]
    weights, own_loss = fitted(folders[1], tmp_path / "run", *options)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert own_loss == loss


def test_evaluate_and_predict_say_the_same_of_them(folders, run):
    plain, awkward = folders
    out = run[0]
    said = hubpath("evaluate", out, "--data", plain).output
    found = hubpath("evaluate", out, "--data", awkward).output
    assert found == said + f"note scored the 10 images of {awkward / 'test'}\n"

    def lines(folder):
        images = sorted(p for p in (folder / "test").rglob("*") if p.is_file())
        return [
            line.split(": ", 1)[1] for line in hubpath("predict", out, *images).output.splitlines()
        ]

    assert len(lines(plain)) == 10
    assert lines(awkward) == lines(plain)


def test_check_finds_nothing_in_them_and_names_what_fit_refuses(folders, run, tmp_path):
    _, awkward = folders
    for options in ([], ["--decode"]):
        said = hubpath("data", "check", "folder", "--root", awkward, *options).output
        assert "complete" in said
    bad = awkward / "train" / "a" / "bad.tif"
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(bad)
    try:
        words = f"{bad} (mode I, signed integers, here from 0 to 70000: nothing says which is white"
        check = ["data", "check", "folder", "--root", str(awkward), "--decode"]
        checked = CliRunner().invoke(app, check)
        assert checked.exit_code != 0
        assert words in checked.output.replace("\n", " ")
        assert words in refused(*FIT, "--data", awkward, "--out", tmp_path / "run")
    finally:
        bad.unlink()
