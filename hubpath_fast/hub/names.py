"""The names of all models, read from the sources of timm and torchvision without importing them.

Importing the two takes seconds; a list of names must not. Both libraries register a model by a
decorator over its function and its weights in literal tables, and those are what is read. A library
that does it otherwise one day is imported after all.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from .spec import HUBS

MOCO_NAMES = ("moco/resnet50.v1_200ep", "moco/resnet50.v2_200ep", "moco/resnet50.v2_800ep")
BACKBONES = ("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "deeplabv3_resnet50")

ENTRY = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
TABLE = re.compile(r"^\w*default_cfgs\w*[^=\n]*= ?[\w(]*(\{.*?^\})", re.MULTILINE | re.DOTALL)
BUILDER = re.compile(r"^def (\w+)\(\s*\*,\s*weights: (?:Optional\[)?(\w+)", re.MULTILINE)
ENUM = re.compile(r"^class (\w+)\(WeightsEnum\):\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
MEMBER = re.compile(r"^    (\w+) = Weights\(", re.MULTILINE)
WILDCARDS = "*?["


@lru_cache(maxsize=1)
def all_names() -> tuple[str, ...]:
    """Every name of every source, tags included, sorted; local files have no list."""
    timm = (f"timm/{name}" for name in _timm())
    torchvision = (f"torchvision/{name}" for name in _torchvision())
    return (*MOCO_NAMES, *sorted(timm), *sorted(torchvision))


def list_models(pattern: str = "*") -> list[str]:
    """Hubs and models whose names match a pattern, such as "timm/*convnext*.fb_in1k".

    pattern: as file names have it; one without a source matches in any, one without wildcards
    matches anywhere in a name.
    """
    if not any(mark in pattern for mark in WILDCARDS):
        pattern = f"*{pattern}*"
    return [
        name
        for name in (*HUBS, *all_names())
        if fnmatch.fnmatchcase(name, pattern)
        or fnmatch.fnmatchcase(name.partition("/")[2], pattern)
    ]


def closest(name: str) -> str:
    """A hint after "there is no such model": the closest names, or a way to search."""
    bare = name.rpartition("/")[2]
    by_bare: dict[str, list[str]] = {}
    for full in all_names():
        rest = full.partition("/")[2]
        for key in (rest, rest.partition(".")[0]):
            by_bare.setdefault(key, []).append(full)
    source = name.rpartition("/")[0]
    pool = [k for k, fulls in by_bare.items() if not source or _of(source, fulls)]
    close = difflib.get_close_matches(bare, [*pool, *HUBS], n=3, cutoff=0.6)
    if not close:
        return "`hubpath hub list WORD` lists the names that hold a word"
    return f"did you mean {' or '.join(close)}?"


def _of(source: str, names: list[str]) -> bool:
    return any(name.startswith(f"{source}/") for name in names)


def _folder(package: str) -> Path:
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / "models"


def _timm() -> set[str]:
    """timm's architectures that have no weights, and NAME.TAG of all weights."""
    architectures: set[str] = set()
    tagged: set[str] = set()
    for path in _folder("timm").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        architectures.update(ENTRY.findall(text))
        for table in TABLE.findall(text):
            tagged.update(_with_weights(table))
    tagged = {name for name in tagged if name.partition(".")[0] in architectures}
    if not architectures or not tagged:
        import timm

        architectures, tagged = set(timm.list_models()), set(timm.list_pretrained())
    return tagged | (architectures - {name.partition(".")[0] for name in tagged})


def _with_weights(text: str) -> list[str]:
    """The keys of a table of weights whose entry says where the weights are."""
    table = ast.parse(text, mode="eval").body
    if not isinstance(table, ast.Dict):  # computed from another table
        return []
    names = []
    for key, value in zip(table.keys, table.values, strict=True):
        given = {k.arg: k.value for k in getattr(value, "keywords", ())}
        places = (given.get(name) for name in ("url", "hf_hub_id", "file"))
        if isinstance(key, ast.Constant) and any(
            place is not None and getattr(place, "value", True) for place in places
        ):
            names.append(key.value)
    return names


def _torchvision() -> set[str]:
    """torchvision's classifiers and the three other tasks' networks, as NAME.WEIGHTS."""
    folder = _folder("torchvision")
    names: set[str] = set()
    others = [folder / "segmentation" / "deeplabv3.py"]
    others += [folder / "detection" / f"{task}_rcnn.py" for task in ("mask", "keypoint")]
    for path in [*folder.glob("*.py"), *others]:
        text = path.read_text(encoding="utf-8")
        members = {enum: MEMBER.findall(body) for enum, body in ENUM.findall(text)}
        for name, enum in BUILDER.findall(text):
            if path not in others or name in BACKBONES:
                names.update(f"{name}.{member}" for member in members.get(enum, ()))
    if not names:
        from .torchvision_models import list_names

        names = set(list_names())
    return names
