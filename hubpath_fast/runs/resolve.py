"""What a run of ``hubpath fit`` is to do: defaults, presets, files and options, merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.named import DIGITS, FOLDER
from ..fields import Settings, full_name, nested
from ..training import TrainerConfig
from ..training.config import moved_milestones
from .config import CLASSIFICATION, LANDMARKS, FitConfig
from .folder import RunFolder
from .presets import DEFAULTS, preset

# Of the experts' rate, where nothing else says: the heads and the router are new and learn faster.
HEAD_FACTOR, ROUTER_FACTOR = 3, 10


def settings(
    out_dir: str | Path,
    resume: bool,
    file: str | Path | None,
    top: Mapping[str, Any],
    trainer: Mapping[str, Any],
    preset_name: str | None = None,
    extra: Sequence[str] = (),
    begin: Mapping[str, Any] | None = None,
    task: str = CLASSIFICATION,
) -> FitConfig:
    """A run's settings: a preset, or ``file``, or those of the run that is resumed, or else the
    defaults of a run (``presets.DEFAULTS``) and over them ``begin``; over these what was asked
    for (``top`` for the run, ``trainer`` for its trainer; None: not asked) and last ``extra``, as
    "KEY=VALUE", such as "decay=0.2".

    What hangs on another setting moves along unless it is asked for as well: with steps the
    milestones and eval_every, with the experts' rate those of heads and router, with data that it
    is a user's folder ("data_root" in ``top`` is the place of a named set instead).

    task: what the command learns; a preset, a file or a run of another is refused.

    Raises:
        ValueError: no data or no hub, an unknown or impossible setting.
    """
    base: dict[str, Any] = {}
    if preset_name is not None and file is not None:
        raise ValueError("preset and config: both are complete settings; give one of them")
    if preset_name is not None:
        base = preset(preset_name)
    elif file is not None:
        base = FitConfig.load(file).to_dict()
    elif resume and (held := RunFolder(Path(out_dir)).config()) is not None:
        base = held.to_dict()
    held_task = base.get("task", CLASSIFICATION)
    if base and held_task != task:
        where = f"preset {preset_name}" if preset_name else f"{file or out_dir}"
        right = "hubpath fit" if held_task == CLASSIFICATION else f"hubpath {held_task} fit"
        raise ValueError(f"{where} is of the task {held_task}; use `{right}`")
    own = {"trainer": TrainerConfig().to_dict(), **base}.pop("trainer")
    top, asked = ({k: v for k, v in given.items() if v is not None} for given in (top, trainer))
    landmarks: dict[str, Any] = {}
    for given in (top, parse_set(extra)):
        asked |= given.pop("trainer", {})
        landmarks |= given.pop(LANDMARKS, {})
        top |= given
    if "data" in top and "data_root" in top:
        raise ValueError("data and data-root: both say where the data is; give one of them")
    if "data_root" in top:
        top["data"] = top.pop("data_root")
    elif "data" in top and "dataset" not in top and base.get("data") != top["data"]:
        top["dataset"] = FOLDER
    values = {**own, **_moved_along(own, asked, bool(base)), **asked}
    if top.get("k") == 1:  # one expert alone has nothing to be compared to
        top.setdefault("router_supervision", 0.0)
    first = base or {**DEFAULTS[task], **(begin or {})}
    landmarks = {**first.get(LANDMARKS, {}), **landmarks}
    made = FitConfig.from_dict({**first, **top, LANDMARKS: landmarks, "trainer": values})
    if made.dataset == DIGITS and made.data is not None and not resume:
        raise ValueError(
            f"data: the digits come with scikit-learn and lie in no folder, got {made.data}; leave "
            "it out, or leave out the data set's name to train on the images of that folder"
        )
    return made


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" -> (0, 1, 2); ValueError unless it is a list of different whole numbers."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds: expected different whole numbers such as 0,1,2, got {text!r}")
    return seeds


def parse_set(extra: Sequence[str], kind: type[Settings] = FitConfig) -> dict[str, Any]:
    """Settings as ``kind.from_dict`` takes them; values as JSON, else as plain text."""
    found: dict[str, Any] = {}
    for text in extra:
        key, mark, value = text.partition("=")
        if not mark or not key.strip():
            raise ValueError(f"set: expected KEY=VALUE, such as momentum=0.8, got {text!r}")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        found[full_name(kind, key.strip())] = read
    return nested(found)


def _moved_along(
    base: Mapping[str, Any], asked: Mapping[str, Any], complete: bool
) -> dict[str, Any]:
    """complete: the base is somebody's whole settings, whose proportions are kept."""
    moved: dict[str, Any] = {}
    steps = asked.get("steps")
    if isinstance(steps, int) and steps > 0:
        if "eval_every" not in asked:
            moved["eval_every"] = max(1, steps // 10)
        moved["milestones"] = moved_milestones(base.get("milestones", ()), base["steps"], steps)
        if base.get("milestones") and not moved["milestones"]:
            moved["schedule"] = "constant"  # too short a run for its rate to fall
    if asked.get("schedule", base.get("schedule")) != "steps":
        moved["milestones"] = []
    rate = asked.get("lr_expert")
    if isinstance(rate, (int, float)):
        for name, factor in (("lr_head", HEAD_FACTOR), ("lr_router", ROUTER_FACTOR)):
            if complete and (base[name] is None or not base["lr_expert"]):
                continue  # it follows the experts' by itself, or in no proportion to them
            if complete:
                factor = base[name] / base["lr_expert"]
            moved[name] = factor * rate
    return moved
