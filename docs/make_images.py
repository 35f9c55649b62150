"""Draws the pictures of the README: the method, and what the demo found.

    python -m docs.make_images
    python -m docs.make_images demo-0 demo-1 demo-2 --hardware "two cores of an AMD EPYC, idle"

Numbers come from ``docs/results/demo-accuracy.json`` and ``demo-weights.json``, and from nothing
else. Given folders of ``hubpath demo``, one for each seed, it first writes these two files from
them: accuracies of all, the mean weights of the first.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from bench.records import commit
from hubpath_fast import report
from hubpath_fast.compare.results import SeedResults
from hubpath_fast.data import RENDERINGS, DigitsTask
from hubpath_fast.tasks.classification import Classification

DOCS = Path(__file__).resolve().parent
RESULTS, IMAGES = DOCS / "results", DOCS / "images"
ACCURACY, WEIGHTS = "demo-accuracy.json", "demo-weights.json"
DPI = 180

INK, FAINT, RULE, IDLE = "#1f2328", "#59636e", "#c9d1d9", "#f6f8fa"
ASKED = {1: ("#0072B2", 0.70), 3: ("#D55E00", 0.21)}  # experts of the diagram's image, and weights
SHOWN = 2  # of the inverted test digits


def read_demos(folders: Sequence[Path], hardware: str) -> dict[str, dict[str, Any]]:
    """The two files' contents, from finished demos of different seeds."""
    demos = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    seeds = [demo["seed"] for demo in demos]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"demos: expected different seeds, got {seeds}")
    day = datetime.date.fromtimestamp((folders[0] / "summary.json").stat().st_mtime)
    measured = {
        "command": "hubpath demo --seed S --out demo-S",
        "commit": commit(),
        "date": day.isoformat(),
        "hardware": hardware,
        "torch": torch.__version__,
        "timm": version("timm"),
        "seeds": seeds,
    }
    k, everyone = demos[0]["k"], len(demos[0]["singles"])
    rows = [
        ("best single expert", 1, "best_single"),
        (f"ensemble of the best {k}", k, "ensemble_top_k"),
        (f"ensemble of {everyone}, hard vote", everyone, "ensemble_hard"),
        (f"ensemble of {everyone}, soft vote", everyone, "ensemble"),
        ("Hub-Pathway", k, "hub_pathway"),
        ("oracle", everyone, "oracle"),
    ]
    accuracies = [
        {"name": name, "forwards": forwards, "accuracies": [demo[key] for demo in demos]}
        for name, forwards, key in rows
    ]
    accuracies[-1]["bound"] = True

    results = SeedResults(folders[0], seeds[0], ())
    weights, groups = results.predictions("pathway")["weights"], results.targets()["groups"]
    by_group = [weights[groups == i].mean(dim=0).tolist() for i in groups.unique()]
    found = {
        "test_images": len(groups),
        "experts": list(demos[0]["singles"]),
        "renderings": results.problem["group_names"],
        "mean_weights": [[round(weight, 4) for weight in row] for row in by_group],
    }
    return {
        ACCURACY: measured | {"rows": accuracies},
        WEIGHTS: measured | {"seeds": seeds[:1]} | found,
    }


def accuracy_against_cost(found: dict[str, Any]) -> Figure:
    """The six rows: mean test accuracy over expert forwards an image."""
    rows = [
        {
            "name": row["name"],
            "value": mean(row["accuracies"]),
            "spread": stdev(row["accuracies"]) if len(row["accuracies"]) > 1 else None,
            "forwards": row["forwards"],
            "bound": row.get("bound", False),
        }
        for row in found["rows"]
    ]
    return report.measure_against_cost(rows, Classification.metric)


def heat_map(found: dict[str, Any]) -> Figure:
    """Which expert is asked, by rendering."""
    return report.mean_weights(
        found["mean_weights"], found["renderings"], found["experts"], "rendering of the digit"
    )


def method() -> Figure:
    """One image on its way: generator, K of M experts, aggregator, prediction."""
    task = DigitsTask(seed=0)
    inverted = list(RENDERINGS).index("inverted")
    shown = int((task.test.renderings == inverted).nonzero()[SHOWN])
    figure = Figure((9.0, 3.5), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9.0), ylim=(0, 3.5))
    axes.set_axis_off()

    middle, xs = 1.72, {"image": 0.3, "generator": 1.75, "experts": 4.15, "aggregator": 6.55}
    picture(axes, task.test.images[shown, 0], xs["image"], middle - 0.35, 0.7)
    text(axes, xs["image"] + 0.35, middle - 0.52, "image")
    arrow(axes, (xs["image"] + 0.75, middle), (xs["generator"] - 0.04, middle), INK, 1.4)
    box(axes, xs["generator"], middle - 0.8, 1.25, 1.6, IDLE, RULE)
    text(axes, xs["generator"] + 0.62, middle + 0.62, "generator", bold=True)
    bars = [ASKED.get(i, (RULE, weight))[1] for i, weight in enumerate((0.03, 0, 0.04, 0, 0.02))]
    for i, weight in enumerate(bars):
        y = middle + 0.32 - 0.19 * i
        color = ASKED[i][0] if i in ASKED else RULE
        axes.barh(y, 0.85 * weight, 0.12, left=xs["generator"] + 0.3, color=color)
        text(axes, xs["generator"] + 0.19, y, str(i + 1), size=6.5)
    text(axes, xs["generator"] + 0.62, middle - 0.67, "a weight for each", size=6.5, color=FAINT)

    height, gap = 0.46, 0.14
    top = middle + 2.5 * height + 2 * gap
    for i, name in enumerate(RENDERINGS):
        bottom = top - (i + 1) * height - i * gap
        color = ASKED[i][0] if i in ASKED else RULE
        box(axes, xs["experts"], bottom, 1.55, height, "white" if i in ASKED else IDLE, color)
        drawn = task.rendered("test", name).images[shown, 0]
        picture(axes, drawn, xs["experts"] + 0.07, bottom + 0.06, 0.34, 1 if i in ASKED else 0.35)
        ink = INK if i in ASKED else FAINT
        text(axes, xs["experts"] + 0.98, bottom + height / 2, f"expert {i + 1}", color=ink)
        if i in ASKED:
            y = bottom + height / 2
            arrow(axes, (xs["generator"] + 1.29, middle), (xs["experts"] - 0.04, y), color, 1.8)
            inwards = (xs["aggregator"] - 0.04, middle + (0.12 if i < 2 else -0.12))
            arrow(axes, (xs["experts"] + 1.59, y), inwards, color, 1.8)
            x = xs["experts"] + 1.98
            lift = 0.22 if i < 2 else -0.22
            text(axes, x, y + lift, f"× {ASKED[i][1]:.2f}", color=color, bold=True)
    text(
        axes,
        xs["experts"] + 0.78,
        0.13,
        "K = 2 of M = 5 are run; in each: what it was pre-trained on",
        size=7.5,
        color=FAINT,
    )

    box(axes, xs["aggregator"], middle - 0.35, 1.25, 0.7, IDLE, RULE)
    text(axes, xs["aggregator"] + 0.62, middle, "aggregator", bold=True)
    arrow(axes, (xs["aggregator"] + 1.29, middle), (8.22, middle), INK, 1.4)
    label = task.test.classes[task.test.targets[shown]]
    text(axes, 8.5, middle, f"“{label}”", size=15, bold=True)
    text(axes, 8.5, middle - 0.52, "prediction")
    return figure


def box(axes: Axes, x: float, y: float, width: float, height: float, face: str, edge: str) -> None:
    style = "round,pad=0,rounding_size=0.07"
    look = {"facecolor": face, "edgecolor": edge, "linewidth": 1.4}
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, **look))


def arrow(axes: Axes, start: tuple, end: tuple, color: str, width: float) -> None:
    look = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, xytext=start, arrowprops=look)


def picture(axes: Axes, image: torch.Tensor, x: float, y: float, side: float, alpha=1.0) -> None:
    """A grey image uint8 [H, W] as a square."""
    place = (x, x + side, y, y + side)
    look = {"cmap": "gray", "vmin": 0, "vmax": 255, "aspect": "auto"}
    axes.imshow(image.numpy(), extent=place, alpha=alpha, zorder=2, **look)
    axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=RULE, zorder=3))


def text(axes: Axes, x: float, y: float, words: str, size=8.5, color=INK, bold=False) -> None:
    weight = "bold" if bold else "normal"
    axes.text(x, y, words, size=size, color=color, weight=weight, ha="center", va="center")


def main(argv: Sequence[str] | None = None, results: Path = RESULTS, images: Path = IMAGES) -> None:
    parser = argparse.ArgumentParser(prog="docs.make_images", description=__doc__.split("\n")[0])
    parser.add_argument("demos", type=Path, nargs="*", metavar="DEMO", help="a demo's folder")
    parser.add_argument("--hardware", help="on what the demos ran, and what else ran there")
    args = parser.parse_args(argv)
    if bool(args.demos) != bool(args.hardware):
        parser.error("DEMO and --hardware: give both, or none to draw what is stored")
    if args.demos:
        for name, content in read_demos(args.demos, args.hardware).items():
            (results / name).write_text(json.dumps(content, indent=1) + "\n")
    stored = {name: json.loads((results / name).read_text()) for name in (ACCURACY, WEIGHTS)}
    figures = {
        "method": method(),
        "demo-accuracy": accuracy_against_cost(stored[ACCURACY]),
        "demo-weights": heat_map(stored[WEIGHTS]),
    }
    images.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        # Without the version of the writer in it, equal figures give equal bytes.
        figure.savefig(images / f"{name}.png", dpi=DPI, metadata={"Software": None})
        print(images / f"{name}.png")


if __name__ == "__main__":
    main()
