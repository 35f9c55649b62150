"""What ``hubpath`` writes: which of its folders a folder is, by its files, and what takes it.

Data leave such folders out, and a command that is given the wrong one says which is the right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Held = Mapping[str, Any]
Words = tuple[str, str]  # what it is, and what takes it


@dataclass(frozen=True)
class Written:
    """name: one of those below. what: in words. use: the commands that take it."""

    name: str
    what: str
    use: str


def find_written(folder: str | Path, names: Iterable[str] | None = None) -> Written | None:
    """What a folder is; None where ``hubpath`` did not write it, or it cannot be read.

    names: of what it holds, where they are known: no file is opened without need.
    """
    folder = Path(folder)
    there = None if names is None else set(names)
    for name, (file, *beside), keys, words in _KINDS:
        if there is not None and Path(file).parts[0] not in there:
            continue
        held = held_in(folder / file, keys)
        if held is not None and all((folder / other).is_file() for other in beside):
            return Written(name, *words(folder, held))
    return None


def described(place: str | Path, *own: str) -> str | None:
    """A sentence for whoever took ``place`` for something else; None: it is unknown, or one of
    ``own``, names of what the caller takes."""
    path = Path(place)
    if path.suffix in PACKAGES and path.is_file():
        return f"{place} is a package, of `hubpath export`; docs/export.md says how it is run"
    found = find_written(path)
    if found is None or found.name in own:
        return None
    return f"{place} is {found.what}; use {found.use}"


def lacks(folder: str | Path, file: str) -> str:
    """What to say of a folder that was to hold a file: it may not be there itself."""
    return f"no {file}" if Path(folder).is_dir() else "there is no such folder"


def held_in(path: Path, keys: Iterable[str]) -> Held | None:
    """What a file of JSON holds, if that is an object with these keys."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) and held.keys() >= set(keys) else None


def _run(folder: Path, held: Held, command: str = "hubpath") -> Words:
    return (
        f"a run of `{command} fit`",
        f"`{command} evaluate {folder}`, `{command} predict {folder} ...`, or "
        f"`hubpath report {folder}`",
    )


def _landmarks(folder: Path, held: Held) -> Words:
    return _run(folder, held, "hubpath landmarks")


def _seeds(folder: Path, held: Held) -> Words:
    seeds = held["seeds"] if isinstance(held["seeds"], list) else ["S"]
    names = ", ".join(f"seed-{seed}" for seed in seeds)
    return "a run of several seeds", f"that of one seed, in {folder}: {names}"


def _demo(folder: Path, held: Held) -> Words:
    return "the folder of a demo", f"its page, {folder}/report.html"


def _shelf(folder: Path, held: Held) -> Words:
    return (
        "a shelf, of `hubpath shelf extract`",
        f"`hubpath shelf predict {folder} ...`, or rank, fit, compare, prune, add or unfreeze in "
        "place of predict",
    )


def _shelf_hub(folder: Path, held: Held) -> Words:
    shelf = os.path.normpath(folder / str(held["shelf"]))
    return (
        "a routed hub of a shelf, of `hubpath shelf fit`",
        f"`hubpath shelf predict {shelf} --hub {folder} ...`, or compare, prune, add or unfreeze "
        "in place of predict",
    )


def _games(folder: Path, held: Held) -> Words:
    what = "a comparison of games, of `hubpath atari compare`"
    return what, f"`hubpath atari report {folder}`"


def _comparison(folder: Path, held: Held) -> Words:
    return "a comparison, of `hubpath compare`", f"`hubpath report {folder}`"


def _package(folder: Path, held: Held) -> Words:
    return "a package, of `hubpath export`", "serve.py, which lies in it, as docs/serving.md says"


def _saved(folder: Path, held: Held) -> Words:
    model = held["model"] if isinstance(held["model"], dict) else {}
    task = model.get("task")
    points = isinstance(task, dict) and task.get("name") == "landmarks"
    command = "hubpath landmarks" if points else "hubpath"
    return (
        "a saved hub, of `hubpath save`",
        f"`{command} predict {folder} ...`, or `{command} evaluate {folder} --data OTHER`",
    )


def _checkpoint(folder: Path, held: Held) -> Words:
    return "a checkpoint of a run", f"the run, {os.path.normpath(folder / os.pardir)}"


def _game(folder: Path, held: Held) -> Words:
    return (
        "a run of `hubpath atari`",
        f"`hubpath atari evaluate {folder}`, or `hubpath atari report {folder}`",
    )


def _game_checkpoint(folder: Path, held: Held) -> Words:
    run = Path(os.path.normpath(folder / os.pardir))
    return "a checkpoint of a run of `hubpath atari`", _game(run, held)[1]


PACKAGES = (".pt2", ".onnx")
RUN, LANDMARKS, SEEDS, GAME, CHECKPOINT = "run", "landmarks", "seeds", "game", "checkpoint"
COMPARISON, GAMES, DEMO = "comparison", "games", "demo"
SHELF, SHELF_HUB, SAVED, PACKAGE = "shelf", "shelf's hub", "saved hub", "package"
# Files of each, and keys of what the first one holds; the narrower first.
_KINDS: tuple[tuple[str, tuple[str, ...], set[str], Callable[[Path, Held], Words]], ...] = (
    (RUN, ("fit.json",), {"config", "classes", "image_size"}, _run),
    (LANDMARKS, ("fit.json",), {"config", "landmarks", "image_size"}, _landmarks),
    (SEEDS, ("seeds.json",), {"config", "seeds"}, _seeds),
    (DEMO, ("demo.json",), {"settings"}, _demo),
    (SHELF, ("shelf.json",), {"format", "sizes", "dtype"}, _shelf),
    (SHELF_HUB, ("hub.json",), {"format", "shelf", "models"}, _shelf_hub),
    (GAMES, ("compare.json",), {"settings", "targets", "methods", "seeds"}, _games),
    (COMPARISON, ("compare.json",), {"settings"}, _comparison),
    (PACKAGE, ("parts.json",), {"hubpath_package"}, _package),
    (CHECKPOINT, ("config.json",), {"hubpath_format", "atari"}, _game_checkpoint),
    (CHECKPOINT, ("config.json", "state.pt"), {"hubpath_format"}, _checkpoint),
    (SAVED, ("config.json",), {"hubpath_format", "model"}, _saved),
    (GAME, ("last/config.json",), {"hubpath_format", "atari"}, _game),
)
