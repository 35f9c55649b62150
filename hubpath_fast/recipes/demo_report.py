"""The demo's ``report.html``: who was asked, how it went, and where it still fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import report
from ..compare.digits_hub import NETWORKS, expert_names
from ..tasks.classification import ACCURACY
from ..tasks.classification_report import sample_heads

if TYPE_CHECKING:
    from .demo import Demo

SAMPLES = 3  # images shown of each rendering: a line of the figure


def write_report(path: Path, result: Demo) -> None:
    """Writes one self-contained HTML page."""
    experts = zip(expert_names(), NETWORKS, strict=True)
    report.write_page(
        path,
        "Hub-Pathway on handwritten digits",
        [_accuracy(result), _routing(result), _failures(result), _training(result)],
        subtitle=f"Five tiny networks, each pre-trained on one rendering of 700 digits: "
        f"{', '.join(f'{name} ({network})' for name, network in experts)}. "
        f"Seed {result.seed}, {result.seconds:.0f} s in all.",
    )


def _accuracy(result: Demo) -> report.Section:
    k, total = result.settings.k, len(expert_names())
    hub, ensemble = result.accuracy("Hub-Pathway"), result.accuracy("ensemble, soft vote")
    table = report.Table(
        ["method", "test accuracy", "expert forwards per image", "training, s"],
        [[row.name, row.accuracy, row.forwards, row.seconds] for row in result.rows],
        formats={"training, s": ".0f"},
    )
    bounds = [i for i, row in enumerate(result.rows) if row.bound]
    table.highlight = report.best_cells(table, "test accuracy", skip=bounds)
    bars = report.measure_bars(
        [
            {"name": row.name, "value": row.accuracy, "forwards": row.forwards, "bound": row.bound}
            for row in result.rows
        ],
        ACCURACY,
    )
    return report.Section(
        "How good is it?",
        f"Hub-Pathway asks {k} of {total} experts about each image and is right on {hub:.1%} of "
        f"{len(result.test)} test digits; the ensemble asks all {total} and reaches "
        f"{ensemble:.1%}. Every method started from the same pre-trained weights and took the same "
        "number of steps; a vote takes as long as all the single experts that it needs.\n\n"
        "Two rows are bounds that nobody can reach by choosing on other data: the single expert "
        "that turns out best on the test digits, and the oracle, which counts a digit as right "
        "where any single expert is.",
        [table, report.Picture(bars, "Accuracy on the test digits.", "Test accuracy by method")],
    )


def _routing(result: Demo) -> report.Section:
    test, names = result.test, expert_names()
    groups = [test.renderings == i for i in range(len(test.rendering_names))]
    mean = torch.stack([result.weights[group].mean(dim=0) for group in groups])
    shown = torch.cat([group.nonzero().flatten()[:SAMPLES] for group in groups])
    heat = report.mean_weights(mean, list(test.rendering_names), names, "rendering of the digit")
    samples = report.samples_with_weights(
        test.images[shown],
        result.weights[shown],
        names,
        sample_heads(
            [test.classes[i] for i in test.targets[shown]],
            [test.classes[i] for i in result.prediction[shown]],
        ),
        result.prediction[shown] != test.targets[shown],
        [test.rendering_names[i] for i in test.renderings[shown]],
    )
    return report.Section(
        "Whom does it ask?",
        "The generator was never told how a digit is drawn, nor what an expert was pre-trained on. "
        "It learned whom to ask from the classes of the target digits alone.",
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
    test = result.test
    correct = torch.stack([row.correct for row in result.rows]).double()
    groups = [test.renderings == i for i in range(len(test.rendering_names))]
    by_group = torch.stack([correct[:, group].mean(dim=1) for group in groups], dim=1)
    figure = report.measure_by_group(
        by_group,
        [row.name for row in result.rows],
        list(test.rendering_names),
        ACCURACY,
        group_label="rendering of the test digit",
        bounds=[i for i, row in enumerate(result.rows) if row.bound],
    )
    return report.Section(
        "Where does each method fail?",
        "A single expert is good at what it was pre-trained on and poor elsewhere; routing should "
        "be good in every column.",
        [
            report.Picture(
                figure,
                "Accuracy of each method (rows) on the test digits of each rendering (columns).",
                "Heat map of test accuracy by method and rendering",
            )
        ],
    )


def _training(result: Demo) -> report.Section:
    return report.Section(
        "How did it learn?",
        "Load is the share of rows that an expert got. Entropy is that of the mean routing, as a "
        "share of its largest value: near 0 the hub would have collapsed to one expert.",
        [
            report.Picture(
                report.training_curves(result.history, expert_names(), ACCURACY),
                "Hub-Pathway's training, step by step.",
                "Curves of losses, accuracy, load and entropy over the steps of training",
            )
        ],
    )
