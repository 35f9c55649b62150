"""``hubpath shelf unfreeze``: the experts of a frozen hub that matter most, trained on end to end.

Nothing is trained here: OUT gets ``start.safetensors``, what those experts, the router and the
aggregator learned, with the shelf's list of images beside it, and ``command``, the `hubpath fit`
that goes on from it on the shelf's own data, with the shelf's own split, whatever has been added to
that data since: images that chose heads and experts must not be trained on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Any

from ..data.named import FOLDER as OWN_IMAGES
from ..files import write_bytes
from ..measure import Measure
from ..runs.places import check_apart, check_not_taken
from ..runs.start import absolute
from ..shelf.prune import smaller
from ..shelf.run import ShelfHub
from ..shelf.save import open_hub_of
from ..shelf.unfreeze import FitPlan, choose, plan_fit, start_of

UNFREEZE = "unfreeze"  # the folder in SHELF, unless another is named
START, COMMAND, RUN = "start.safetensors", "command", "run"
TOP = 5


def unfreeze(
    shelf: str | Path,
    top: int | None = None,
    hub: str | Path | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Writes what `hubpath fit` starts with.

    Args:
        shelf: its folder.
        top: how many experts go on; None: 5, or all where there are fewer.
        hub: the folder of its routed hub; None: SHELF/hub.
        out: folder of what is written; None: SHELF/unfreeze. What an earlier call left there is
            replaced, but not once it was trained on.

    Returns:
        "experts": [{"name", "asked"}] of "of"; "value" of the whole hub and "loss" of these experts
        alone on "images" validation images (see ``runs.prune.Loss``; None where all go on);
        "command"; "notes": where the training begins otherwise than the frozen hub left off.

    Raises:
        ValueError: no shelf, no hub, ``top`` out of range, no validation images, features of one's
            own, bodies that cannot be opened any more; a run in ``out``, of an earlier call.
    """
    opened = open_hub_of(shelf, hub)
    folder = Path(shelf) / UNFREEZE if out is None else Path(out)
    if not opened.shelf.record.dataset:
        raise ValueError(
            f"shelf: {shelf} is of features of your own, and not of images that `hubpath fit` can "
            "read; extract a shelf with --data FOLDER"
        )
    check_apart(folder, opened.shelf.record.dataset, opened.shelf.record.data)
    check_not_taken(folder)
    if (folder / RUN).exists():
        raise ValueError(
            f"out: {folder / RUN} is a run that began with what was written to {folder}, which it "
            "may need again; give another --out"
        )
    chosen = choose(opened, min(TOP, len(opened.models)) if top is None else top)
    small = smaller(opened, chosen.kept)
    plan = plan_fit(small, folder)
    start_of(small).write(folder / START)
    command = fit_command(small, plan, folder)
    write_bytes(folder / COMMAND, os.fsencode(command + "\n"))
    return {
        "experts": [
            {"name": label, "asked": asked}
            for label, asked in zip(small.labels, chosen.asked, strict=True)
        ],
        "of": len(opened.models),
        "images": chosen.images,
        "value": chosen.value,
        "loss": None if chosen.loss is None else dataclasses.asdict(chosen.loss),
        "command": command,
        "notes": list(plan.notes),
    }


def fit_command(hub: ShelfHub, plan: FitPlan, out: Path) -> str:
    """The whole command, for a shell: the shelf's data and split, and what ``plan`` says."""
    record = hub.shelf.record
    words: list[Any] = ["hubpath", "fit"]
    if record.dataset == OWN_IMAGES:
        words += ["--data", record.data]
    else:
        words += ["--dataset", record.dataset]
        words += ["--data-root", record.data] if record.data else []
    words += ["--validation", record.validation, "--seed", record.seed]
    settings = dict(plan.settings)
    if record.views == 1:  # heads and router know no other crop than that of evaluation
        settings["augment"] = "none"
    else:
        words += [] if record.flip else ["--no-flip"]
        settings["min_area"] = record.min_area
    words += ["--hub", ",".join(plan.hub), "--k", hub.model.k, "--image-size", plan.size]
    settings["start"] = absolute(out / START)
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words += ["--set", f"{name}={text}"]
    return shlex.join(map(str, [*words, "--out", absolute(out / RUN)]))


def sentence(result: dict[str, Any], metric: Measure) -> str:
    """What the experts lose by themselves, before a step is taken."""
    count, loss = len(result["experts"]), result["loss"]
    if loss is None:
        who = f"all {count} experts go on" if count > 1 else "its one expert goes on"
        return f"{who}: {metric.title} {metric.text(result['value'])}"
    said = (
        f"{count} of {result['of']} experts go on: {metric.title} {metric.text(loss['value'])} in "
        f"place of {metric.text(result['value'])} on {result['images']} validation images, by "
        "which they were chosen, before a step is taken"
    )
    if loss["interval"] is None:
        return said
    low, high = loss["interval"]
    return f"{said} (95 % interval of the points lost: {low + 0.0:.1f} to {high + 0.0:.1f})"
