"""What comes of ``hubpath atari demo``: ``summary.json``, the table of the terminal, the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as TerminalTable

from .. import report
from ..compare.results import read
from ..measure import Measure
from ..tasks.atari.comparison import RESULT, Method
from ..tasks.atari.run_report import as_history
from ..tasks.atari.settings import FINETUNE, HUB, SCRATCH
from ..tasks.atari.statistics import Interval, bootstrap
from ..training import read_log
from .atari_demo_games import NAMES, SHOWN, Played, read_moments

POINTS = Measure("points", decimals=2)
CHANCE = "actions at random"
OF = {"ahead": "ahead of", "level": "level with", "behind": "behind"}
INTERVALS = (
    "Intervals are bootstrap intervals of 95 % over the episodes that were played: they say how "
    "well this run was measured, not how much another seed would change."
)


@dataclass(frozen=True)
class Demo:
    """A finished demo. runs: folder of each method's run by its name, sources: of each source's by
    game. played: the medley by each method, chance: by actions at random."""

    seed: int
    methods: tuple[Method, ...]
    runs: Mapping[str, Path]
    sources: Mapping[str, Path]
    played: Mapping[str, Played]
    chance: Played

    @property
    def hubs(self) -> list[Method]:
        return [method for method in self.methods if method.method == HUB]

    @property
    def best_source(self) -> Method:
        """Of the fine-tuned ones, that which turned out best: chosen after the fact, in favour of
        the rivals."""
        tuned = [method for method in self.methods if method.method == FINETUNE]
        return max(tuned, key=lambda method: self.played[method.name].mean)

    @property
    def rivals(self) -> list[Method]:
        scratch = next(method for method in self.methods if method.method == SCRATCH)
        return [self.best_source, scratch]

    def lead(self, method: Method, rival: Method) -> Interval:
        """By how many points a method is better. The i-th episode is the same game for both."""
        own, other = (np.array(self.played[m.name].scores) for m in (method, rival))
        return bootstrap([own - other])


def said(lead: Interval) -> str:
    """The word that the interval allows."""
    return "ahead" if lead.low > 0 else "behind" if lead.high < 0 else "level"


def summary_of(demo: Demo, seconds: float) -> dict[str, Any]:
    """The contents of ``summary.json``."""
    results = {name: read(folder / RESULT) for name, folder in demo.runs.items()}
    sources = {game: read(folder / RESULT) for game, folder in demo.sources.items()}
    return {
        "seed": demo.seed,
        "steps": results[HUB]["steps"],
        "episodes": len(demo.chance.scores),
        "seconds": seconds,
        "source_seconds": sum(found["seconds"] for found in sources.values()),
        "sources": {game: found["curve"][-1][1] for game, found in sources.items()},
        "random": _reached(demo.chance),
        "methods": {
            method.name: {
                "title": method.title,
                **_reached(demo.played[method.name]),
                "seconds": results[method.name]["seconds"],
                "steps_per_second": results[method.name]["steps_per_second"],
                "curve": results[method.name]["curve"],
            }
            for method in demo.methods
        },
        "best_source": demo.best_source.name,
        "differences": [
            {"method": hub.name, "rival": rival.name, **lead._asdict(), "said": said(lead)}
            for hub in demo.hubs
            for rival in demo.rivals
            for lead in [demo.lead(hub, rival)]
        ],
        "weights": {
            hub.name: {
                game: dict(zip(NAMES, weights, strict=True))
                for game, weights in demo.played[hub.name].weights.items()
            }
            for hub in demo.hubs
        },
    }


def _reached(played: Played) -> dict[str, Any]:
    """Points, their interval, and points by game."""
    found = bootstrap([played.scores])
    games = {name: float(played.of(name).mean()) for name in NAMES if name in played.games}
    return {"score": found.value, "low": found.low, "high": found.high, "by_game": games}


def terminal_table(summary: Mapping[str, Any]) -> TerminalTable:
    shown = TerminalTable(caption=f"means of {summary['episodes']} games", caption_justify="left")
    shown.add_column("method")
    for head in ("points", "95 %\ninterval", *NAMES):
        shown.add_column(head, justify="right")
    for title, row in _rows(summary):
        own = row["by_game"]
        games = [POINTS.number(own[name]) if name in own else "–" for name in NAMES]
        span = f"{POINTS.number(row['low'])}–{POINTS.number(row['high'])}"
        shown.add_row(title, POINTS.number(row["score"]), span, *games)
    return shown


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (CHANCE, summary["random"]), *((row["title"], row) for row in summary["methods"].values()),
    ]  # fmt: skip


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """A sentence for each hub: whether it is ahead of the best source and of learning from
    scratch."""
    titles = {name: row["title"] for name, row in summary["methods"].items()}
    return [
        f"{titles[hub]} is "
        + " and ".join(
            f"{OF[d['said']]} "
            f"{'learning ' if d['rival'] == SCRATCH else 'the policy '}{titles[d['rival']]} "
            f"({d['value']:+.2f} points, {d['low']:+.2f} to {d['high']:+.2f})"
            for d in summary["differences"]
            if d["method"] == hub
        )
        + "."
        for hub in summary["weights"]
    ]


def write_report(path: Path, demo: Demo, summary: Mapping[str, Any]) -> None:
    """Writes one self-contained HTML page."""
    scores = ", ".join(f"{game} {score:.1f}" for game, score in summary["sources"].items())
    report.write_page(
        path,
        "Hub-Pathway on small games",
        [_reach(demo, summary), _routing(demo), _failures(demo, summary), _training(demo, summary)],
        subtitle=f"Three policies, each trained on one small game of our own (points at the end: "
        f"{scores}), learn the medley of them in {summary['steps']:,} steps. Seed "
        f"{summary['seed']}, {summary['seconds']:.0f} s in all.",
    )


def _reach(demo: Demo, summary: Mapping[str, Any]) -> report.Section:
    rows = _rows(summary)
    table = report.Table(
        ["method", "points", "low", "high", *NAMES],
        [
            [title, row["score"], row["low"], row["high"]]
            + [row["by_game"].get(name) for name in NAMES]
            for title, row in rows
        ],
        formats=dict.fromkeys(("points", "low", "high", *NAMES), ".2f"),
        caption=f"Means of {summary['episodes']} episodes after the last step",
    )
    table.highlight = report.best_cells(table, "points")
    bars = report.measure_bars(
        [
            {
                "name": title, "value": row["score"], "spread": (row["high"] - row["low"]) / 2,
                "bound": title == CHANCE,
            }
            for title, row in rows
        ],
        POINTS,
    )  # fmt: skip
    caption = f"Points in the medley. Whiskers and ± are half an interval of 95 %. {INTERVALS}"
    return report.Section(
        "How good is it?",
        " ".join(verdicts(summary)) + "\n\nAll methods play and learn the same number of steps. "
        "Each episode is one of three games, with its buttons in another place, so that all last "
        "layers are new. The best of the fine-tuned policies is chosen after the fact, in their "
        "favour.",
        [table, report.Picture(bars, caption, "Points in the medley by method")],
    )


def _routing(demo: Demo) -> report.Section:
    pictures = []
    for hub in demo.hubs:
        weights = demo.played[hub.name].weights
        heat = report.mean_weights(
            np.array(list(weights.values())), list(weights), list(NAMES), "game of the episode"
        )
        pictures.append(
            report.Picture(
                heat,
                f"{hub.title}: mean weight of each policy (columns, by the game that it was "
                "trained on) over all steps of each game (rows). Policies that are not asked "
                "count as 0.",
                f"Heat map of the mean weight of each policy on each game, {hub.title}",
            )
        )
    best = max(demo.hubs, key=lambda hub: demo.played[hub.name].mean)
    if read_moments(demo.runs[best.name]):
        pictures.append(_boards(demo, best))
    return report.Section(
        "Who is asked?",
        "The generator was never told which game is played, nor what a policy was trained on. It "
        "sees the board and learned whom to ask from points alone.",
        pictures,
    )


def _boards(demo: Demo, hub: Method) -> report.Picture:
    found = read_moments(demo.runs[hub.name])
    games = [NAMES[number] for number in found["games"].tolist()]
    figure = report.samples_with_weights(
        found["boards"], found["weights"], list(NAMES), games,
        notes=[f"step {SHOWN[i % len(SHOWN)]}" for i in range(len(games))],
    )  # fmt: skip
    return report.Picture(
        figure,
        f"Boards of one episode of each game, and the policies that {hub.title} asked about them, "
        "with their weights. Blue is the player, yellow where it wants to be, red where not.",
        "Boards of the three games with the weights of the policies that were asked",
    )


def _failures(demo: Demo, summary: Mapping[str, Any]) -> report.Section:
    rows = _rows(summary)
    names = [name for name in NAMES if name in demo.chance.games]
    figure = report.measure_by_group(
        np.array([[row["by_game"][name] for name in names] for _, row in rows]),
        [title for title, _ in rows], names, POINTS, group_label="game of the episode", bounds=[0],
    )  # fmt: skip
    return report.Section(
        "Where does each method fail?",
        "A fine-tuned policy knows one game and has to learn two.",
        [
            report.Picture(
                figure,
                "Mean points of each method (rows) in the episodes of each game (columns).",
                "Heat map of mean points by method and game",
            )
        ],
    )


def _training(demo: Demo, summary: Mapping[str, Any]) -> report.Section:
    curves: dict[int, dict[str, Any]] = {}
    for row in summary["methods"].values():
        for step, score in row["curve"]:
            curves.setdefault(step, {"step": step})[row["title"]] = {POINTS.name: score}
    pictures = [
        report.Picture(
            report.training_curves([curves[step] for step in sorted(curves)], NAMES, POINTS),
            "Points of a few episodes in the course of learning, by method.",
            "Curves of points over steps for each method",
        )
    ]
    for hub in demo.hubs:
        log = read_log(demo.runs[hub.name] / "log.jsonl")
        history = as_history(log, routed=True, measure=POINTS)
        pictures.append(
            report.Picture(
                report.training_curves(history, list(NAMES), POINTS),
                f"{hub.title}: its losses, its points, the share of rows that each policy got, and "
                "its mean weight, with the noise of training.",
                f"Curves of losses, points, load and mean weight over the steps, {hub.title}",
            )
        )
    return report.Section("How did it learn?", "", pictures)
