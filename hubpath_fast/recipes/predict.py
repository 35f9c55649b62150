"""``hubpath predict``: what a trained run says of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import load_image
from ..data.transforms import eval_transform
from ..hub import expert_names
from ..runs.folder import open_run

BATCH = 32  # images at a time, so that a thousand files do not need a thousand images of memory


@dataclass(frozen=True)
class Prediction:
    """An image's class, its probability, and who spoke with what weight, largest first."""

    path: Path
    label: str
    probability: float
    experts: dict[str, float]


@torch.no_grad()
def predict(run: str | Path, images: Sequence[str | Path], device: str = "cpu") -> list[Prediction]:
    """Classifies image files with a run's best checkpoint.

    Raises:
        ValueError: no run in the folder; a file that is missing or no image (by path).
    """
    if not images:
        raise ValueError("images: expected at least one file, got none")
    opened = open_run(run, device)
    transform = eval_transform(opened.image_size)
    names = expert_names(opened.config.hub)
    predictions = []
    for start in range(0, len(images), BATCH):
        paths = [Path(p) for p in images[start : start + BATCH]]
        batch = torch.stack([transform(load_image(path)) for path in paths]).to(device)
        routing = opened.model.route(batch)
        probabilities = opened.model(batch, routing=routing).float().softmax(dim=1)
        best, labels = probabilities.max(dim=1)
        for n, path in enumerate(paths):
            pairs = zip(routing.experts[n].tolist(), routing.weights[n].tolist(), strict=True)
            spoke = {names[i]: weight for i, weight in pairs}
            label = opened.classes[labels[n]]
            predictions.append(Prediction(path, label, best[n].item(), spoke))
    return predictions
