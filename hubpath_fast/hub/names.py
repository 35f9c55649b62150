"""The names of all models: a list that is made once for each version of timm and torchvision.

Importing the two takes seconds, and a list of names must not. So what they say is kept in the
user's cache folder, in a file that has both versions in its name.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import warnings
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from ..files import user_cache_folder, write_json
from .spec import HUBS

MOCO_NAMES = ("moco/resnet50.v1_200ep", "moco/resnet50.v2_200ep", "moco/resnet50.v2_800ep")
OWN_NAMES = (*MOCO_NAMES, *HUBS["lite"])  # of sources that no library lists
BACKBONES = ("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "deeplabv3_resnet50")
WILDCARDS = "*?["
SHORTEST_BEGINNING = 5  # letters; "vit" begins too many names to be a hint


@lru_cache(maxsize=1)
def all_names() -> tuple[str, ...]:
    """Every name of every source, tags included, sorted; local files have no list."""
    try:
        folder = user_cache_folder()
    except ImportError:  # a bare checkout on a machine without platformdirs: nothing is kept
        return (*OWN_NAMES, *_ask_libraries())
    return (*OWN_NAMES, *library_names(folder))


def library_names(folder: Path) -> list[str]:
    """All "timm/NAME.TAG" ("timm/NAME" where there are no weights) and "torchvision/NAME.WEIGHTS".

    Read from a file in ``folder``. Where it is missing or damaged the two libraries are imported
    and it is written; a folder that cannot be written only means that the next process asks again.
    """
    versions = "-".join(f"{library}-{version(library)}" for library in ("timm", "torchvision"))
    path = folder / f"names-{versions}.json"
    with contextlib.suppress(OSError, ValueError):
        names = json.loads(path.read_text(encoding="utf-8"))
        if names and isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    names = _ask_libraries()
    with contextlib.suppress(OSError):
        write_json(path, names)
    return names


def _ask_libraries() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's on its image library
        import timm
        from torchvision import models
    tagged = timm.list_pretrained()
    bare = set(timm.list_models()) - {name.partition(".")[0] for name in tagged}
    classifiers = models.list_models(module=models)
    return [
        *sorted(f"timm/{name}" for name in (*tagged, *bare)),
        *sorted(
            f"torchvision/{name}.{weights.name}"
            for name in (*classifiers, *BACKBONES)
            for weights in models.get_model_weights(name)
        ),
    ]


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
    """A hint after "there is no such model": the closest names, or a way to search.

    First those that differ in case and hyphens alone, here or in another source, then those that
    begin as it does, then those that are spelt alike.
    """
    source, slash, bare = name.rpartition("/")
    pool: dict[str, None] = {}  # each once: most architectures have several tags
    elsewhere: dict[str, None] = {}
    for full in all_names():
        own, _, rest = full.partition("/")
        architecture = rest.partition(".")[0]
        if own == source or (not slash and own != "package"):  # which cannot be left out
            pool |= {architecture: None, rest: None}
        elif own != "moco":
            elsewhere[f"{own}/{architecture}"] = None
    plain = _plain(bare)
    found = [n for n in pool if _plain(n) == plain]
    found += [n for n in elsewhere if _plain(n.partition("/")[2]) == plain]
    if len(plain) >= SHORTEST_BEGINNING:
        found += [n for n in pool if _plain(n).startswith(plain) and ("." in bare or "." not in n)]
    found += difflib.get_close_matches(bare.lower(), [*pool, *HUBS], n=3, cutoff=0.6)
    close = [*dict.fromkeys(found)][:3]
    if not close:
        return "`hubpath hub list WORD` lists the names that hold a word"
    return f"did you mean {' or '.join(close)}?"


def _plain(name: str) -> str:
    return name.lower().translate(str.maketrans("", "", "-_ "))
