"""Which networks give a map that a head of heat maps can stand on: one small network of each of
timm's modules and of each of torchvision's classes, on the meta device.

    python -m bench.last_maps [MODULE ...]

A line for each: what the network gives, F, the pixels a side of a cell; or why it is refused.
"""

from __future__ import annotations

import sys
import warnings

import timm
from torchvision import models

from hubpath_fast.hub.errors import HubError
from hubpath_fast.hub.source import on_meta
from hubpath_fast.tasks.landmarks import attach_heatmap_head

# What small networks are called, the smallest first.
SMALL = (
    "test",
    "femto",
    "atto",
    "nano",
    "pico",
    "tiny",
    "xx",
    "mini",
    "micro",
    "small",
    "_s",
    "b0",
)


def smallest(names: list[str]) -> str:
    return min(names, key=lambda name: (*[word not in name for word in SMALL], len(name), name))


def described(make) -> tuple[bool, str]:
    """(whether it has a map, what it is or why not)."""
    try:
        found = on_meta(lambda: attach_heatmap_head(make(), 1)).found
    except (HubError, NotImplementedError) as error:
        return False, str(error)
    tokens = f", {found.prefix} of no place" if found.prefix else ""
    return True, f"{found.axes}{tokens}, F = {found.channels}, {found.stride} px a cell"


def of_timm(modules: list[str]) -> dict[str, str]:
    """A name for each module."""
    known = timm.list_modules()
    return {
        f"timm {module}": smallest(timm.list_models(module=module))
        for module in sorted(modules or known)
        if timm.list_models(module=module)
    }


def of_torchvision() -> dict[str, str]:
    """A name for each class."""
    by_class: dict[str, str] = {}
    for name in models.list_models(module=models):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = type(on_meta(lambda n=name: models.get_model(n))).__name__
        by_class.setdefault(f"torchvision {kind}", name)
    return by_class


def main(modules: list[str]) -> None:
    timms = of_timm(modules)
    others = {} if modules else of_torchvision()
    counts = []
    for what, name in (*timms.items(), *others.items()):
        make = timm.create_model if what in timms else models.get_model
        has, text = described(lambda n=name, m=make: m(n))
        counts.append(has)
        print(f"{what:40} {name:36} {text}", flush=True)
    print(f"{sum(counts)} of {len(counts)} give a map")


if __name__ == "__main__":
    main(sys.argv[1:])
