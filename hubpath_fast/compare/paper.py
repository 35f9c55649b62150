"""The paper's own numbers, for the hubs and data sets that it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from ..hub.spec import HUBS

TABLES = "paper_tables.json"
SETS = {
    "cifar-100": "cifar100",
    "coco-70": "coco70",
    "aircraft": "aircraft",
    "cars": "cars",
    "indoors": "indoors",
    "dmlab": "dmlab",
    "eurosat": "eurosat",
}
# Of each hub: the tables that have it, and what they call its experts, in the hub's order.
PAPER_HUBS = {
    "paper-homogeneous": (
        ("table1_homogeneous", "table4_ablation", "table5_selection"),
        ("ImageNet", "MoCo", "MaskRCNN", "DeepLab", "Keypoint"),
    ),
    "paper-heterogeneous": (
        ("table2_heterogeneous",),
        ("MobileNetV3", "EffNetB3", "SwinT", "ConvNeXtT", "MaskRCNN"),
    ),
}


def paper_numbers(hub: Sequence[str], dataset: str) -> dict[str, dict[str, float]]:
    """The paper's figures in 0..1, by its name of the method: {"mean": ..., "std": ...}, std only
    where the paper has it. Experts alone are there by "single-I". Empty for any other hub
    than the paper's two (whole, in order) or another data set.
    """
    names = [name for name, members in HUBS.items() if tuple(hub) == members]
    if not names or names[0] not in PAPER_HUBS or dataset not in SETS:
        return {}
    tables, experts = PAPER_HUBS[names[0]]
    content = json.loads((files(__package__) / TABLES).read_text(encoding="utf-8"))
    found: dict[str, dict[str, float]] = {}
    for table in tables:
        for method, by_set in content[table].items():
            if SETS[dataset] in by_set:
                found.setdefault(method, _fractions(by_set[SETS[dataset]]))
    singles = {f"single-{i}": found[name] for i, name in enumerate(experts)}
    return {**{k: v for k, v in found.items() if k not in experts}, **singles}


def _fractions(value: Any) -> dict[str, float]:
    values = value if isinstance(value, dict) else {"mean": value}
    return {name: number / 100 for name, number in values.items()}
