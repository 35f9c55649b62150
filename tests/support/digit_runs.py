"""Small runs on drawn digits, for tests of commands."""

from __future__ import annotations

from pathlib import Path

import torch

from hubpath_fast.data import DigitsTask, write_image_folder
from hubpath_fast.runs.folder import open_run
from support.command import hubpath


def draw_digits(folder: Path) -> Path:
    """60 images of each split, by class."""
    return write_image_folder(DigitsTask(0, 60), folder, limit=60)


def fit_digits(digits: Path, out: Path, *more: object) -> Path:
    """A run of three networks of random weights, of four steps, unless ``more`` says otherwise."""
    hubpath(
        "fit", "--data", digits, "--hub", "test_resnet,test_vit,test_resnet", "--no-pretrained",
        "--image-size", 32, "--batch-size", 16, "--workers", 0, "--steps", 4, "--out", out, *more,
    )  # fmt: skip
    return out


def save_spread(run: Path, out: Path) -> Path:
    """The run's hub, with routes that differ from image to image."""
    model = open_run(run).model
    torch.manual_seed(0)
    torch.nn.init.normal_(model.generator.clean.weight, std=10.0)
    model.save_pretrained(out)
    return out
