"""The paper's own numbers, for the hubs and data sets that it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from ..hub.spec import HUBS
from ..runs.config import LANDMARKS, FitConfig
from ..training import Task

TABLES = "paper_tables.json"
PUBLISHED, OCULAR = "published", "ocular"  # targets and unit of the paper's errors of landmarks
SETS = {
    "cifar-100": "cifar100",
    "coco-70": "coco70",
    "aircraft": "aircraft",
    "cars": "cars",
    "indoors": "indoors",
    "dmlab": "dmlab",
    "eurosat": "eurosat",
    "300w": "300w",
    "wflw": "wflw",
    "cofw": "cofw",
}
# Of each hub: the tables that have it, and what they call its experts, in the hub's order.
PAPER_HUBS = {
    "paper-homogeneous": (
        ("table1_homogeneous", "table3_landmarks", "table4_ablation", "table5_selection"),
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
    singles = {f"single-{i}": found[name] for i, name in enumerate(experts) if name in found}
    return {**{k: v for k, v in found.items() if k not in experts}, **singles}


def numbers_beside(fit: FitConfig) -> dict[str, dict[str, float]]:
    """``paper_numbers`` for a comparison, where its figures mean the same."""
    return {} if _differ(fit) else paper_numbers(fit.hub, fit.dataset)


def notes_on_figures(fit: FitConfig, task: Task, beside: bool) -> list[str]:
    """What figures mean that a data set alone does not say, see ``Landmarks.facts``. beside: the
    paper's own stand in the table."""
    if fit.task != LANDMARKS:
        return []
    said = [
        f"{task.metric.title} is in percent {task.measured}, of maps learned from {task.targets} "
        "targets; figures over another unit, or of other targets, do not compare with these."
    ]
    if beside:
        said.append(
            "The paper's are of one seed, and the code that its protocol comes from keeps the "
            "epoch that is best on the test faces; here faces held out from train choose."
        )
    elif paper_numbers(fit.hub, fit.dataset):
        said.append(
            f"The paper's own stand beside ours only for published targets over the outer eye "
            f"corners: {_differ(fit)} here (--preset landmarks-{fit.dataset} has them)."
        )
    return said


def _differ(fit: FitConfig) -> str:
    """Why figures are not of the same kind as the paper's, in words; "": they are."""
    if fit.task != LANDMARKS:
        return ""
    own = fit.landmarks
    if own.targets != PUBLISHED:
        return f"targets are {own.targets}"
    return "" if own.unit in (None, OCULAR) else f"the unit is {own.unit}"


def _fractions(value: Any) -> dict[str, float]:
    values = value if isinstance(value, dict) else {"mean": value}
    return {name: number / 100 for name, number in values.items()}
