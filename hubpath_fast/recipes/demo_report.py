"""The demo's ``report.html``: who was asked, how it went, and where it still fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import report
from ..compare.methods import Method
from ..compare.results import SeedResults
from ..compare.settings import CompareSettings
from ..compare.tables import also, as_table, bar_of, describe_budget
from ..data import TensorSet
from ..measure import Measure
from ..report.sections import initial
from ..training import read_log

SAMPLES = 3  # images shown of each rendering: a line of the figure


@dataclass(frozen=True)
class Words:
    """What a page says that hangs on what is learned.

    title: the page's. reached: a sentence on what Hub-Pathway reaches. oracle: what the oracle's
    row is. taught: what the router learned from. failing: what to look for where methods fail.
    """

    title: str
    reached: Callable[[Demo], str]
    oracle: str
    taught: str
    failing: str


class Demo(NamedTuple):
    """A finished demo. rows: as in ``table.json``, of the methods. summary: ``summary.json``.
    words: of its page."""

    settings: CompareSettings
    results: SeedResults
    methods: Sequence[Method]
    rows: Sequence[dict[str, Any]]
    test: TensorSet
    summary: dict[str, Any]
    words: Words

    @property
    def measure(self) -> Measure:
        return self.results.task.metric

    @property
    def experts(self) -> list[str]:
        return list(self.summary["singles"])

    @property
    def groups(self) -> list[Tensor]:
        """bool [test images] for each rendering."""
        return [self.test.renderings == i for i in range(len(self.test.rendering_names))]

    @property
    def bounds(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row["bound"]]


def _right(result: Demo) -> str:
    k, total = result.summary["k"], len(result.experts)
    hub, ensemble = result.summary["hub_pathway"], result.summary["ensemble"]
    return (
        f"Hub-Pathway asks {k} of {total} experts about each image and is right on {hub:.1%} of "
        f"{len(result.test)} test digits; the ensemble asks all {total} and reaches {ensemble:.1%}."
    )


CLASSES = Words(
    "Hub-Pathway on handwritten digits",
    _right,
    "which counts a digit as right where any single expert is",
    "the classes of the target digits",
    "A single expert is good at what it was pre-trained on and poor elsewhere; routing should be "
    "good in every column.",
)


def write_report(path: Path, result: Demo) -> None:
    """Writes one self-contained HTML page."""
    networks = ", ".join(f"{name} ({net})" for name, net in result.summary["networks"].items())
    report.write_page(
        path,
        result.words.title,
        [_accuracy(result), _routing(result), _failures(result), _training(result)],
        subtitle=f"Five tiny networks, each pre-trained on one rendering of 700 digits: "
        f"{networks}. Seed {result.summary['seed']}, {result.summary['seconds']:.0f} s in all.",
    )


def _accuracy(result: Demo) -> report.Section:
    measure, name = result.measure, result.measure.title
    table = as_table(result.rows, measure, also(result.settings))
    bars = report.measure_bars([bar_of(row) for row in result.rows], measure)
    picture = report.Picture(bars, f"{initial(name)} on the test digits.", f"Test {name} by method")
    return report.Section(
        "How good is it?",
        f"{result.words.reached(result)} Every method started from the same pre-trained weights; a "
        "vote takes as long as all the single experts that it needs. "
        f"{describe_budget(result.settings)}\n\n"
        "Two rows are bounds that nobody can reach by choosing on other data: the single expert "
        f"that turns out best on the test digits, and the oracle, {result.words.oracle}.",
        [table, picture],
    )


def _routing(result: Demo) -> report.Section:
    test, names, groups = result.test, result.experts, result.groups
    outputs = result.results.predictions("pathway")
    weights = outputs["weights"]
    mean = torch.stack([weights[group].mean(dim=0) for group in groups])
    shown = torch.cat([group.nonzero().flatten()[:SAMPLES] for group in groups])
    heat = report.mean_weights(mean, list(test.rendering_names), names, "rendering of the digit")
    said = result.results.task.report(outputs["test"][shown], test.targets[shown])
    samples = report.samples_with_weights(
        test.images[shown],
        weights[shown],
        names,
        said["heads"],
        said["marked"],
        [test.rendering_names[i] for i in test.renderings[shown]],
        marks=said.get("marks"),
    )
    return report.Section(
        "Who is asked?",
        "The generator was never told how a digit is drawn, nor what an expert was pre-trained on. "
        "It learned which experts to ask from "
        f"{result.words.taught} alone.",
        [
            report.Picture(
                heat,
                "Mean weight of each expert (columns, by the rendering it was pre-trained on) on "
                "the test digits of each rendering (rows). Experts that are not asked count as 0.",
                "Heat map of the mean weight of each expert on each rendering",
            ),
            report.Picture(
                samples,
                f"The first {SAMPLES} test digits of each rendering and the experts they were "
                "sent to, with their weights.",
                "Sample digits with the weights of the experts that were asked",
            ),
        ],
    )


def _failures(result: Demo) -> report.Section:
    name = result.measure.title
    scores = torch.stack([method.scores(result.results) for method in result.methods])
    figure = report.measure_by_group(
        torch.stack([scores[:, group].mean(dim=1) for group in result.groups], dim=1),
        [row["title"] for row in result.rows],
        list(result.test.rendering_names),
        result.measure,
        group_label="rendering of the test digit",
        bounds=result.bounds,
    )
    return report.Section(
        "Where does each method fail?",
        result.words.failing,
        [
            report.Picture(
                figure,
                f"{initial(name)} of each method (rows) on the test digits of each rendering "
                "(columns).",
                f"Heat map of test {name} by method and rendering",
            )
        ],
    )


def _training(result: Demo) -> report.Section:
    history = read_log(result.results.folder("pathway") / "log.jsonl")
    return report.Section(
        "How did it learn?",
        "Load is the share of rows that an expert got. Entropy is that of the mean routing, as a "
        "share of its largest value: near 0 the hub would have collapsed to one expert.",
        [
            report.Picture(
                report.training_curves(history, result.experts, result.measure),
                "Hub-Pathway's training, step by step.",
                f"Curves of losses, {result.measure.title}, load and entropy over the steps of "
                "training",
            )
        ],
    )
