"""Photographs with a disc of its own colour at each of three landmarks, and a run that finds them
without being trained: its experts' maps are the colours."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import hubpath_fast as hp
from hubpath_fast.model import ExpertOrigin
from hubpath_fast.runs.config import LANDMARKS, FitConfig
from hubpath_fast.runs.folder import Run, RunFolder
from hubpath_fast.tasks.landmarks import LandmarkLayout
from hubpath_fast.tasks.landmarks.task import Landmarks

NAMES = ("left_eye", "right_eye", "mouth")
HUB = ("test_resnet", "test_vit")


class Colours(nn.Module):
    """Images in [0, 1], [n, 3, S, S] -> maps [n, 3, S / 4, S / 4]: the amounts of each colour."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.one * F.avg_pool2d(x, 4)


class Always(nn.Module):
    """The first expert before the second, for every image."""

    def forward(self, x):
        clean = torch.tensor([[2.0, 1.0]]).expand(len(x), 2)
        return clean, torch.zeros_like(clean)


def blob_run(data=None, size=64, **settings) -> Run:
    layout = LandmarkLayout("folder", 3, names=NAMES)
    config = FitConfig.from_dict(
        {"task": LANDMARKS, "data": str(data), "dataset": "folder", "hub": list(HUB), "workers": 0,
         **settings}
    )  # fmt: skip
    as_is = torch.zeros(2, 3), torch.ones(2, 3)
    experts, options = [Colours(), Colours()], {"num_outputs": 3, "normalization": as_is}
    model = hp.HubPathway(experts, Always(), k=2, **options).eval()
    named = tuple(ExpertOrigin(None, name, "Colours") for name in HUB)
    model.origin = dataclasses.replace(model.origin, experts=named)
    return Run(config, Landmarks(layout), size, model, folder=RunFolder(Path("run")))


def blob_photo(path, points, width=200, height=160, radius=6.0, **how):
    """Writes a photograph with a soft disc about each point; origin 0."""
    y, x = np.mgrid[0:height, 0:width]
    discs = [np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2)) for px, py in points]
    Image.fromarray((255 * np.stack(discs, -1)).round().astype(np.uint8)).save(path, **how)
    return path


def blob_list(path, rows):
    """A user's list: rows of (name of the image, points)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"{name}_{axis}" for name in NAMES for axis in "xy")])
        for name, points in rows:
            writer.writerow([name, *(value for point in points for value in point)])
    return path
