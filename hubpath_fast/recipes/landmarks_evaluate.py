"""``hubpath landmarks evaluate``: the errors of a trained run on faces whose points are known.

All rows come of one pass over the faces: what a subset or another unit says is worked out from the
points that were found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import EvalBatches
from ..data.named import FACES
from ..runs import measure
from ..runs.build import eval_batches, make_task
from ..runs.config import LANDMARKS, FitConfig
from ..runs.data import open_to_score
from ..runs.folder import Run, RunFolder, open_run
from ..tasks.landmarks.faces import FaceDataset, FaceSplit
from ..tasks.landmarks.kept import digest
from ..tasks.landmarks.metrics import auc, failure_rate, nme, normalizer, unit_landmarks
from ..tasks.landmarks.places import find_list
from ..tasks.landmarks.sets import find_faces
from ..tasks.landmarks.task import EMPTY, THRESHOLD, Landmarks
from .evaluate import no_data

FROM_TRUTH = (
    "boxes come from the true points, as in published tables, or with the list; where a detector "
    "gives them errors are larger: --jitter 0.1 tells by how much"
)


def evaluate_landmarks(
    run: str | Path,
    data: str | Path | None = None,
    images: str | Path | None = None,
    device: str = "cpu",
    subset: str | None = None,
    norms: Sequence[str] = (),
    jitter: float = 0.0,
    data_root: str | Path | None = None,
    workers: int | None = None,
    room: str | int | None = None,
    expert_major: bool = False,
) -> dict[str, Any]:
    """What a run's best checkpoint finds on the faces that its own data has for figures, or on
    those of ``data``.

    Args:
        data: another list of the same landmarks. images: the folder of its photographs.
        subset: of the run's own data, such as "largepose": this alone is scored.
        norms: what errors are divided by, see ``normalizer``; none: the run's own unit.
        jitter: if above 0, all is scored again with boxes that are shifted and scaled by up to this
            share of their side, the same for a face each time.
        data_root: where the run's own data lies now.
        workers: processes that decode; None: as in training.
        room, expert_major: see ``evaluate``.

    Returns:
        "rows": of the faces, then of each published subset, for each norm, without and with
        jitter: "subset", "n", "normalizer", "measured" (that in words), "jitter" and, as shares,
        "nme", "fr_10", "auc_10" and "empty", the maps whose maximum is below 0.1. "split": what was
        scored. "notes": what to know of it. The first row's figures stand beside these, too.

    Raises:
        ValueError: no run of landmarks in the folder; a subset or unit that there is none of; data
            of other landmarks, or with faults.
    """
    if data is not None and (data_root is not None or subset is not None):
        other = "data-root" if data_root is not None else "subset"
        raise ValueError(
            f"data and {other}: give one of them; --data is another list of the same landmarks, "
            f"--{other} is of the run's own data"
        )
    if images is not None and data is None:
        raise ValueError("images: the folder of the photographs of --data; give that, too")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter: expected a share of the boxes' side in [0, 1), got {jitter:g}")
    opened = open_run(run, device, LANDMARKS, room)
    task = opened.task
    norms = tuple(dict.fromkeys(norms)) or (task.unit_name,)
    for how in norms:
        if how not in ("diagonal", task.unit_name):
            unit_landmarks(task.layout, how)
    folder = opened.folder
    if folder is None and data is None:
        raise ValueError(no_data(run))
    if data is None:
        faces, name, parts, notes = _own(folder, opened, subset, data_root)
    else:
        faces, name, parts, notes = _other(folder, opened, Path(data), images)
    rows = []
    for moved in (0.0, jitter) if jitter else (0.0,):
        found, targets = _find(opened, faces, moved, workers, device, expert_major)
        rows += _rows(task, found, targets, {name: range(len(faces)), **parts}, norms, moved)
    notes = [*opened.notes, *notes, *task.remarks(rows[0]), FROM_TRUTH, *opened.room_notes()]
    return {**rows[0], "rows": rows, "split": name, "notes": notes}


def _own(
    folder: RunFolder, opened: Run, subset: str | None, root: str | Path | None
) -> tuple[FaceSplit, str, Mapping[str, Sequence[int]], list[str]]:
    """(faces, what they are called, positions of parts among them, notes) of the run's data."""
    config = opened.config
    splits = open_to_score(folder, config, root)
    opened.task.check_same(make_task(config, splits), root or config.data)
    notes = list(splits.changes)
    if subset is not None:
        return splits.subset(subset), subset, {}, notes
    name = "validation" if splits.test_is_validation else "test"
    return splits.test, name, splits.subsets, notes


def _other(
    folder: RunFolder | None, opened: Run, place: Path, images: str | Path | None
) -> tuple[FaceSplit, str, Mapping[str, Sequence[int]], list[str]]:
    """Likewise of another list, or of a folder of lists, of which the test list is taken."""
    task = opened.task
    if place.is_dir():
        lists = (find_list(place, None, part) for part in ("test", "validation", "train"))
        place = next((file for file in lists if file is not None), place)
    name = _published(opened.config, place)
    found = find_faces(name, place, images, opened.config.landmarks.box, scored=True)
    found.refuse()
    task.check_same(Landmarks(found.layout), place)
    layout = dataclasses.replace(task.layout, origin=found.layout.origin)
    faces = FaceSplit(tuple(found.faces["train"]), layout)  # a list by itself counts as that
    notes = found.notes() if name is None else list(found.remarks)
    trained = folder and _trained_on(folder, opened.config, faces)
    if trained:
        notes.append(
            f"{trained} of the {len(faces)} are faces that the run was trained on, and so count "
            f"for little; `hubpath landmarks evaluate {folder.path}` scores what it held out"
        )
    return faces, place.name, {}, notes


def _trained_on(folder: RunFolder, config: FitConfig, faces: FaceSplit) -> int:
    """How many of the faces the run has learned from, known by their points and boxes."""
    kept = folder.kept_files(config)
    trained = set() if kept is None else {row.label for row in kept.rows["train"]}
    return sum(digest(face) in trained for face in faces.faces)


def _published(config: FitConfig, place: Path) -> str | None:
    """The set in whose form a list is written, if that is the run's own; None: a user's list.

    Such a list has no names of columns that a user's could not have, but counts pixels as its set
    does.
    """
    if config.dataset not in FACES or place.is_dir():
        return None
    if place.suffix.lower() != ".csv":
        return config.dataset
    try:
        with open(place, encoding="utf-8", errors="replace") as file:
            header = file.readline().replace(" ", "")
    except OSError:
        return None
    return config.dataset if header.startswith("image_name,scale,center_w,center_h,") else None


def _find(
    opened: Run,
    faces: FaceSplit,
    jitter: float,
    workers: int | None,
    device: str,
    expert_major: bool,
) -> tuple[Tensor, Tensor]:
    """(predictions [N, L, 3], targets [N, L, 4]), both in cells of the crops that were looked at.

    An error over its unit does not depend on the crop, which is a similarity.
    """
    config, targets = opened.config, []
    if workers is not None:
        config = config.replace(workers=workers)
    size = opened.image_size
    where = "cpu" if expert_major else device  # where the crops wait
    if jitter:
        dataset = FaceDataset(faces, size, jitter=jitter)
        settings = config.trainer.batch_size, config.workers, where, config.prefetch
        batches = EvalBatches(dataset, *settings)
    else:
        batches = eval_batches(faces, config, size, device=where)

    def noted() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, true in batches:
            targets.append(true.cpu())
            yield pixels, true

    amp = config.trainer.amp
    model, task = opened.model, opened.task
    predictions, _ = measure.predict(model, task, noted(), device, amp, expert_major)
    return predictions, torch.cat(targets)


def _rows(
    task: Landmarks,
    found: Tensor,
    targets: Tensor,
    parts: Mapping[str, Sequence[int]],
    norms: Sequence[str],
    jitter: float,
) -> list[dict[str, Any]]:
    rows = []
    for name, positions in parts.items():
        chosen = list(positions)
        points, truth = found[chosen], targets[chosen]
        for how in norms:
            unit, measured = _unit(task, truth, how), dataclasses.replace(task, unit=how).measured
            errors = nme(points[..., :2], truth[..., :2], unit)
            rows.append(
                {
                    "subset": name,
                    "n": len(chosen),
                    "normalizer": how,
                    "measured": measured,
                    "jitter": jitter,
                    "nme": errors.mean().item(),
                    "fr_10": failure_rate(errors, THRESHOLD),
                    "auc_10": auc(errors, THRESHOLD),
                    "empty": (~(points[..., 2] >= EMPTY)).double().mean().item(),
                }
            )
    return rows


def _unit(task: Landmarks, targets: Tensor, how: str) -> Tensor:
    """[N]: of targets [N, L, 4]; the run's own they hold already."""
    if how == task.unit_name:
        return targets[:, 0, 3]
    return normalizer(targets[..., :2], task.layout, how)


def row_text(row: Mapping[str, Any]) -> str:
    """A row on one line, with what its errors are divided by."""
    percent = Landmarks.metric.text
    moved = f", boxes moved by up to {row['jitter']:.0%}" if row["jitter"] else ""
    return (
        f"{row['subset']}{moved}: nme {percent(row['nme'])} {row['measured']}, fr 10 "
        f"{percent(row['fr_10'])}, auc 10 {percent(row['auc_10'])}, empty maps "
        f"{percent(row['empty'])}, {row['n']} faces"
    )
