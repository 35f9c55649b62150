"""``hubpath evaluate``: what a trained run says of images whose classes are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import DataError
from ..data.named import DIGITS, FOLDER
from ..data.other import read_other
from ..data.sources import PUBLISHED
from ..data.splits import Split
from ..runs.build import make_task, score
from ..runs.config import CLASSIFICATION, FitConfig
from ..runs.data import note_if_trained_on, open_to_score
from ..runs.folder import Run, RunFolder, open_run
from .budget import check_asked, follow


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    device: str = "cpu",
    crops: int = 1,
    data_root: str | Path | None = None,
    workers: int | None = None,
    budget_ms: float | None = None,
    top_mass: float | None = None,
    room: str | int | None = None,
    expert_major: bool = False,
) -> dict[str, Any]:
    """What a run's best checkpoint says of the split that its own data has for figures, or of
    ``data``.

    data: a folder, or a list file, of other images of the run's classes, or of some of them; see
    ``read_other`` for what of it is scored. The run's own folder is its own data. crops: of each
    image, 1, 5 or 10; their logits are added up. data_root: where the run's own data lies now.
    workers: processes that decode images; None: as many as in training. budget_ms, top_mass: see
    ``budget.policy_for``. room: see ``open_run``. expert_major: see
    ``HubPathway.predict_expert_major``; of one crop of each image.

    Returns the task's results and "n", the images; "split", what was scored; "notes", what to know
    of that.

    Raises:
        ValueError: no run in the folder; a saved hub without ``data``; data that holds no images of
            classes that the run knows, or others as well; own data whose scored images are not what
            they were.
    """
    if data is not None and data_root is not None:
        raise ValueError(
            "data and data-root: give one of them; --data is other images of the same classes, "
            "--data-root where the run's own data lies now"
        )
    check_asked(budget_ms, top_mass)
    opened = open_run(run, device, CLASSIFICATION, room)
    config, folder = opened.config, opened.folder
    if folder is None and data is None:
        raise ValueError(no_data(run))
    if config.dataset == DIGITS and data_root is not None:
        raise ValueError(
            f"data-root: {run} was trained on the digits, which lie in no folder, got {data_root}; "
            "leave it out, or give other images by --data"
        )
    if data is None or (folder is not None and _is_own(config, data)):
        split, name, notes = _own(folder, opened, data or data_root or config.data)
        if data is not None and name == "validation":
            note = f"{data} is the run's own data: scored the {len(split)} images that it held out"
            notes.insert(0, note)
    else:
        split, name, notes = _other(folder, opened, Path(data))
    follow(run, opened.model, budget_ms, top_mass, data_root)
    task = opened.task
    if workers is not None:
        config = config.replace(workers=workers)
    asked = opened.image_size, crops, device, expert_major
    scores = score(opened.model, task, split, config, *asked)
    if opened.model.policy is not None:
        notes = [*notes, f"{sum(scores['routes']['share']):.2f} experts an image, by the policy"]
    return {**scores, "split": name, "notes": [*opened.notes, *notes, *opened.room_notes()]}


def no_data(run: str | Path) -> str:
    """What to say where a saved hub is to be scored on data of its own."""
    return (
        f"data: {run} is a saved hub, which has no data of its own; give what to score it on by "
        "--data"
    )


def _is_own(config: FitConfig, data: str | Path) -> bool:
    return config.dataset == FOLDER and Path(data).resolve() == Path(config.data).resolve()


def _own(folder: RunFolder, opened: Run, given: str | Path) -> tuple[Split, str, list[str]]:
    """(what is scored of the run's own data, what it is called, notes)."""
    config = opened.config
    splits = open_to_score(folder, config, given)
    opened.task.check_same(make_task(config, splits), given)
    return splits.test, "validation" if splits.test_is_validation else "test", list(splits.changes)


def _other(folder: RunFolder | None, opened: Run, place: Path) -> tuple[Split, str, list[str]]:
    """Likewise of other data."""
    config = opened.config
    try:
        other = read_other(place, opened.classes)
    except DataError as error:
        published = PUBLISHED.get(config.dataset)
        if published is None or not published.is_in(place):
            raise
        raise DataError(
            f"{place} is laid out as {published.title} is published, which the run was trained on: "
            f"for its test images there give --data-root {place}, not --data ({error})"
        ) from error
    trained = folder and note_if_trained_on(folder, config, other.images.paths, place)
    return other.images, other.name, [*other.notes, *([trained] if trained else [])]
