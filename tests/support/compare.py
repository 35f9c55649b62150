"""Small comparisons: two tiny networks with random weights."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from hubpath_fast.compare.settings import CompareSettings, make_settings

EQUAL, MIXED = "test_resnet,test_resnet", "test_resnet,test_efficientnet"
QUIET = Console(quiet=True)


def settings_of(data: Path, hub: str = EQUAL, rates=(1e-3,), steps: int = 3) -> CompareSettings:
    top = {"pretrained": False, "image_size": 32, "workers": 0, "k": 1}
    return make_settings(
        str(data), hub, rates=rates, top=top, trainer={"steps": steps, "batch_size": 8}
    )


def row_of(rows, method: str) -> dict:
    return next(row for row in rows if row["method"] == method)
