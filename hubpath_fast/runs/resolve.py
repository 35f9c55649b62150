"""What a run of ``hubpath fit`` is to do: defaults, presets, files and options, merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.named import FOLDER
from ..files import write_json
from .config import FitConfig
from .presets import DEFAULT_TRAINER, preset

FIT_FILE, SEEDS_FILE = "fit.json", "seeds.json"

# Without a preset, of the experts' rate: the heads and the router are new and learn faster.
HEAD_FACTOR, ROUTER_FACTOR = 3, 10


def settings(
    out_dir: str | Path,
    resume: bool,
    file: str | Path | None,
    top: Mapping[str, Any],
    trainer: Mapping[str, Any],
    preset_name: str | None = None,
    extra: Sequence[str] = (),
) -> FitConfig:
    """A run's settings: the defaults; over them a preset, or ``file``, or those of the run that is
    resumed; over them what was asked for (``top`` for the run, ``trainer`` for its trainer; None:
    not asked) and last ``extra``, as "KEY=VALUE", dotted in the trainer ("trainer.decay=0.2").

    What hangs on another setting moves along unless it is asked for as well: with steps the
    milestones and eval_every, with the experts' rate those of heads and router, with data that it
    is a user's folder ("data_root" in ``top`` is the place of a named set instead).

    Raises:
        ValueError: no data or no hub, an unknown or impossible setting.
    """
    out_dir = Path(out_dir)
    base: dict[str, Any] = {"trainer": DEFAULT_TRAINER.to_dict()}
    if preset_name is not None and file is not None:
        raise ValueError("preset and config: both are complete settings; give one of them")
    if preset_name is not None:
        base = preset(preset_name)
    elif file is not None:
        base = FitConfig.load(file).to_dict()
    elif resume:
        base = _resumed(out_dir) or base
    given, nested = _parse(extra)
    top = {name: value for name, value in top.items() if value is not None} | given
    asked = {name: value for name, value in trainer.items() if value is not None} | nested
    if "data" in top and "data_root" in top:
        raise ValueError("data and data-root: both say where the data is; give one of them")
    if "data_root" in top:
        top["data"] = top.pop("data_root")
    elif "data" in top and "dataset" not in top and base.get("data") != top["data"]:
        top["dataset"] = FOLDER
    base |= top
    if not base.get("hub"):
        raise ValueError("hub: nothing given; use --hub resnet50.a1_in1k,... or --preset NAME")
    values = {**base["trainer"], **_moved_along(base["trainer"], asked, preset_name), **asked}
    try:
        return FitConfig.from_dict({**base, "trainer": values})
    except TypeError as error:
        raise ValueError(f"a setting is of the wrong type ({error})") from error


def read_record(run: Path) -> dict[str, Any]:
    """What ``fit.json`` of a run says; ValueError if it is none or damaged."""
    try:
        return json.loads((run / FIT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{run} holds no run of `hubpath fit` (no {FIT_FILE}); give the folder named by --out"
            + (", and of it one seed's (seed-0, ...)" if (run / SEEDS_FILE).is_file() else "")
        ) from None
    except ValueError as error:
        raise ValueError(f"{run / FIT_FILE} is damaged ({error})") from error


def write_seeds(out_dir: Path, config: FitConfig, seeds: Sequence[int]) -> None:
    """Notes in the folder of a run of several seeds what it does, so that it can be resumed."""
    write_json(out_dir / SEEDS_FILE, {"config": config.to_dict(), "seeds": list(seeds)})


def read_seeds(out_dir: str | Path) -> dict[str, Any] | None:
    """What ``write_seeds`` noted; None where it noted nothing."""
    path = Path(out_dir) / SEEDS_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" -> (0, 1, 2); ValueError unless it is a list of different whole numbers."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds: expected different whole numbers such as 0,1,2, got {text!r}")
    return seeds


def _resumed(out_dir: Path) -> dict[str, Any] | None:
    if (out_dir / FIT_FILE).is_file():
        return read_record(out_dir)["config"]
    seeds = read_seeds(out_dir)
    return seeds["config"] if seeds else None


def _parse(extra: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of the run, settings of its trainer); values as JSON, else as plain text."""
    top: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for text in extra:
        key, mark, value = text.partition("=")
        if not mark or not key.strip() or key.strip() == "trainer":
            raise ValueError(f"set: expected KEY=VALUE, such as trainer.momentum=0.8, got {text!r}")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        outer, dot, inner = key.strip().partition(".")
        if dot and outer != "trainer":
            raise ValueError(f"set: unknown setting {key!r}; only trainer has settings inside")
        (nested if dot else top)[inner or outer] = read
    return top, nested


def _moved_along(
    base: Mapping[str, Any], asked: Mapping[str, Any], preset_name: str | None
) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    steps = asked.get("steps")
    if isinstance(steps, int) and steps > 0:
        if "eval_every" not in asked:
            moved["eval_every"] = max(1, steps // 10)
        points = [round(m * steps / base["steps"]) for m in base.get("milestones", ())]
        moved["milestones"] = sorted({m for m in points if 0 < m < steps})
        if base.get("milestones") and not moved["milestones"]:
            moved["schedule"] = "constant"  # too short a run for its rate to fall
    if asked.get("schedule", base.get("schedule")) != "steps":
        moved["milestones"] = []
    rate = asked.get("lr_expert")
    if isinstance(rate, (int, float)):
        for name, factor in (("lr_head", HEAD_FACTOR), ("lr_router", ROUTER_FACTOR)):
            if preset_name is not None:
                factor = base[name] / base["lr_expert"]
            moved[name] = factor * rate
    return moved
