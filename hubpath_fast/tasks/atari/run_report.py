"""The page of one run on a game: its scores, and how it learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import report
from ...checkpoints import find_checkpoint
from ...measure import Measure
from ...training import read_log
from .comparison import RESULT, read_outcome
from .games import SCORES, human_normalized
from .results import short_steps
from .settings import HUB, AtariSettings
from .sources import LAST, read_config
from .statistics import bootstrap

SCORE = Measure("score", decimals=1)
# Of a line of the log, what is no loss.
NOT_LOSSES = ("step", "grad_norm", "clipped", "score", "steps_per_second")


def run_sections(
    folder: Path, figures: report.FigureFolder
) -> tuple[str, list[report.Section]] | None:
    """(the page's title, its sections); None if the folder holds no run. Figures are written.

    Raises ValueError for a run that has logged nothing yet, or is damaged.
    """
    last = find_checkpoint(folder / LAST)
    if last is None:
        return None
    settings = AtariSettings.from_dict(read_config(last)["atari"])
    history = as_history(read_log(folder / "log.jsonl"), settings.method == HUB)
    if not history:
        raise ValueError(f"{folder} has logged nothing yet; there is nothing to show")
    names = [Path(source).name for source in settings.hub]
    title = f"{settings.game}: {settings.method}, {short_steps(settings.steps)} steps"
    outcome = read_outcome(folder)
    if outcome is None:
        reached = [
            f"Unfinished: {folder / RESULT} is not there yet; the last line of its log is of step "
            f"{history[-1]['step']:,}."
        ]
        title += ", unfinished"
    else:
        reached = [_scores(settings, outcome.scores)]
    figure = report.training_curves(history, names, SCORE)
    picture = figures.picture(
        "training", figure, report.history_table(history),
        "Losses of the updates, scores of evaluations and of the games that ended in training; of "
        "a hub each policy's share of the rows (states that asked it) and its mean weight.",
        "Curves of losses, scores and routing over the steps",
    )  # fmt: skip
    return title, [
        report.Section("What it reaches", "", reached),
        report.Section("How it learned", "", [picture]),
    ]


def as_history(
    log: Sequence[Mapping[str, Any]], routed: bool, measure: Measure = SCORE
) -> list[dict[str, Any]]:
    """Lines of a run's log as ``report.training_curves`` takes them. routed: of a hub, whose shares
    and weights are of its policies. measure: what the curves call a game's score."""
    found = []
    for line in log:
        made: dict[str, Any] = {"step": line["step"]}
        if "evaluation" in line:
            made["evaluation"] = {measure.name: _mean(line["evaluation"])}
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in NOT_LOSSES:
                made[name] = value
        if episodes := line.get("episodes"):
            made["in training"] = {measure.name: _mean([one["score"] for one in episodes])}
        if routed and "share" in line:
            rows = sum(line["share"])  # a state has K of them
            load = [share / rows for share in line["share"]]
            made |= {"load": load, "mean_weight": line["weights"]}
        found.append(made)
    return found


def _scores(settings: AtariSettings, scores: Sequence[float]) -> report.Table:
    found = bootstrap([scores])
    values = {"mean": found.value, "low": found.low, "high": found.high}
    rows = [["score", len(scores), *values.values()]]
    if settings.game in SCORES:
        shares = [100 * human_normalized(value, settings.game) for value in values.values()]
        rows.append(["human-normalised, %", len(scores), *shares])
    caption = (
        f"{settings.game}, after step {settings.steps:,}, seed {settings.seed}: mean over games "
        "with its 95 % bootstrap interval. It is of this one run; other seeds differ by more."
    )
    columns = ["", "games", *values]
    return report.Table(columns, rows, formats=dict.fromkeys(values, ".1f"), caption=caption)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
