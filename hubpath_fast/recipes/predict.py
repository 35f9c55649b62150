"""``hubpath evaluate`` and ``hubpath predict``: what a trained run does with images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import load_image, open_dataset
from ..data.named import FOLDER
from ..data.transforms import eval_transform
from ..hub import expert_names
from ..runs.build import make_task, score
from ..runs.folder import open_run

BATCH = 32  # images at a time, so that a thousand files do not need a thousand images of memory


@dataclass(frozen=True)
class Prediction:
    """An image's class, its probability, and who spoke with what weight, largest first."""

    path: Path
    label: str
    probability: float
    experts: dict[str, float]


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    device: str = "cpu",
    crops: int = 1,
    data_root: str | Path | None = None,
) -> dict[str, Any]:
    """Accuracy and loss of a run's best checkpoint on the test split of its data, or of ``data``.

    data: a folder of other images of the same classes. crops: of each image, 1, 5 or 10; their
    logits are added up. data_root: where the run's own data set lies now.

    Raises:
        ValueError: no run in the folder; data with other classes than the run was trained on.
    """
    opened = open_run(run, device)
    config = opened.config
    place = data or data_root or config.data
    kind = FOLDER if data else config.dataset
    splits = open_dataset(kind, place, config.validation, config.trainer.seed)
    task = make_task(config, opened)
    task.check_same(make_task(config, splits), place)
    scores = score(opened.model, task, splits.test, config, opened.image_size, crops, device)
    return {**scores, "split": "validation" if splits.test_is_validation else "test"}


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
