"""The pages of a comparison of methods on games: tables, figures, and what may be said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ... import report
from .comparison import HUB_K1, Method
from .games import SCORES, human_normalized
from .results import Results, Row, Total, seeds_text, short_steps
from .settings import HUB, KNOWLEDGE_FLOW, SCRATCH, ZOO_TUNING
from .statistics import LEVEL, Interval

PERCENT = f"{LEVEL:.0%}".replace("%", " %")
NO_NUMBERS = "Figure 2 of the paper prints no numbers, so none of its stand beside these."
BETTER, WORSE = "better", "worse"


def sections(results: Results, figures: report.FigureFolder) -> list[report.Section]:
    """The page; its figures are written, each with its numbers.

    Raises ValueError where no run is finished.
    """
    if not results.outcomes:
        raise ValueError(
            f"no run of the comparison is finished yet; {len(results.missing)} are missing. The "
            "same `hubpath atari compare` goes on with them"
        )
    figures.numbers("scores", scores_table(results, results.asked.targets))
    return [
        report.Section("What is compared", "\n\n".join(introduction(results)), [sources(results)]),
        *(_of_game(results, game, figures) for game in results.asked.targets),
        *_over_games(results, figures),
    ]


def introduction(results: Results) -> list[str]:
    """Paragraphs on what all methods share, and what is missing."""
    settings = results.asked.settings
    games = ", ".join(results.asked.targets)
    of_atari = any(game in SCORES for game in results.asked.targets)
    said = [
        f"{results.label}: every run takes {settings.steps:,} steps of its game ({games}; "
        f"{seeds_text(results.asked.seeds)}), and every source took {settings.source_steps:,} of "
        "its own, with one seed. A run's score is the mean of "
        f"{settings.episodes} whole games after its last step.",
        *missing_text(results),
        "± is the standard deviation over seeds (n - 1). Differences are paired by seed, with "
        f"Student's {PERCENT} interval; a method is called {BETTER} or {WORSE} only where that "
        "leaves out 0. The best fine-tuned source is the one that turned out best on these scores, "
        f"which favours it. {_chance(results)}",
        "All other intervals are percentile bootstraps over seeds, stratified by game (Agarwal et "
        "al., 2021); of three seeds such an interval is too narrow, since it cannot reach beyond "
        "the smallest and the largest.",
    ]
    if any(method.k == len(settings.sources) for method in results.methods):
        said.append(
            f"At K = {len(settings.sources)} the hub asks all of its policies about every state: "
            "it weighs them, and nothing is skipped. K = 1 is the variant that routes."
        )
    if settings.set:
        said.append(f"Other settings of all runs: {', '.join(settings.set)}.")
    return [*said, NO_NUMBERS] if of_atari else said


def missing_text(results: Results) -> list[str]:
    """A paragraph that says which runs are missing, and why they failed; none if all are there."""
    missing = results.missing
    if not missing:
        return []
    seeds: dict[tuple[str, str], list[int]] = {}
    for game, method, seed in missing:
        seeds.setdefault((game, method.title), []).append(seed)
    names = [f"{game}: {title} ({seeds_text(own)})" for (game, title), own in seeds.items()]
    total = len(results.outcomes) + len(missing)
    text = f"Partial: {len(results.outcomes)} of {total} runs are finished. Missing: "
    said = [f"{text}{'; '.join(names)}."]
    if results.failures:
        reasons = "; ".join(f"{place}: {why}" for place, why in results.failures.items())
        said.append(f"Failed: {reasons}")
    return said


def _chance(results: Results) -> str:
    rows = [row for game in results.asked.targets for row in results.rows(game)]
    count = sum(
        found is not None and math.isfinite(found.low)
        for row in rows
        for found in (row.over_scratch, row.over_best)
    )
    if not count:
        return "With one seed there are no intervals."
    return (
        f"Where methods are equal, about {count * (1 - LEVEL):.1f} of the {count} intervals here "
        "leave out 0 by chance."
    )


def sources(results: Results) -> report.Table:
    """The policies of the hub."""
    names = results.asked.needed_sources()
    found = [results.sources.get(name) for name in names]
    columns: dict[str, list] = {
        "source": names,
        "steps": [outcome and outcome.steps for outcome in found],
        "score on its game": [outcome and outcome.score for outcome in found],
    }
    if any(name in SCORES for name in names):
        columns["human-normalised, %"] = [
            100 * human_normalized(outcome.score, name) if outcome and name in SCORES else None
            for name, outcome in zip(names, found, strict=True)
        ]
    caption = "Sources, trained from scratch." if names else "No method here has a source."
    formats = dict.fromkeys(list(columns)[2:], ".1f")
    return report.Table(
        list(columns), list(zip(*columns.values(), strict=True)), formats=formats, caption=caption
    )


def game_table(results: Results, game: str) -> report.Table:
    """A row for each method, for readers."""
    rows = results.rows(game)
    best = results.best_source(game)
    decimals = _decimals(rows)
    columns: dict[str, list] = {
        "method": [row.method.title for row in rows],
        "score": [_score(row, decimals) for row in rows],
    }
    if game in SCORES:
        columns["human-normalised, %"] = [
            None if row.mean is None else 100 * human_normalized(row.mean.value, game)
            for row in rows
        ]
    columns["seeds"] = [len(row.scores) for row in rows]
    columns["over scratch"] = [_difference(row.over_scratch, decimals) for row in rows]
    if best is not None:
        name = f"over {best.title.replace('fine-tuned', 'fine-tuning')}"
        columns[name] = [_difference(row.over_best, decimals) for row in rows]
    formats = {name: ".1f" for name in columns if name.startswith("human")}
    caption = f"{game}, {results.label}: score, and paired differences with {PERCENT} intervals."
    cells = list(zip(*columns.values(), strict=True))
    return report.Table(list(columns), cells, formats=formats, caption=caption)


def scores_table(results: Results, games: Sequence[str]) -> report.Table:
    """All numbers, a line for each method on each game."""
    seeds = results.asked.seeds
    columns = [
        "game", "method", "title", "seeds", "score", "deviation", "score low", "score high",
        "human-normalised", "over scratch", "over scratch low", "over scratch high",
        "best fine-tuned", "over best", "over best low", "over best high",
        *(f"seed {seed}" for seed in seeds),
    ]  # fmt: skip
    lines = []
    for game in games:
        best = results.best_source(game)
        for row in results.rows(game):
            mean = row.mean
            known = mean is not None and game in SCORES
            lines.append(
                [
                    game, row.method.name, row.method.title, len(row.scores),
                    *_three(mean)[:1], row.deviation, *_three(mean)[1:],
                    human_normalized(mean.value, game) if known else None,
                    *_three(row.over_scratch), None if best is None else best.name,
                    *_three(row.over_best), *(row.scores.get(seed) for seed in seeds),
                ]
            )  # fmt: skip
    return report.Table(columns, lines)


def totals_table(totals: Sequence[Total]) -> report.Table:
    """Numbers of the figures over games, as fractions."""
    columns = [
        "method", "title", "values", "interquartile mean", "low", "high",
        "probability of improvement over scratch", "its low", "its high",
    ]  # fmt: skip
    rows = [
        [t.method.name, t.method.title, t.count, *_three(t.mean), *_three(t.improvement)]
        for t in totals
    ]
    return report.Table(columns, rows)


def verdict(difference: Interval | None) -> str:
    """BETTER, WORSE, or nothing where the interval does not leave out 0."""
    if difference is None or not difference.excludes(0):
        return ""
    return BETTER if difference.value > 0 else WORSE


def _of_game(results: Results, game: str, figures: report.FigureFolder) -> report.Section:
    table = game_table(results, game)
    pictures = [
        figures.picture(
            f"scores-{game}", score_bars(results, game), scores_table(results, [game]),
            f"{game}, {results.label}. {_bars_caption(results, game)}",
            f"Bars of each method's score on {game}",
        )
    ]  # fmt: skip
    found = {m: results.learning(game, m) for m in results.methods}
    found = {method: learning for method, learning in found.items() if learning is not None}
    if found:
        curves = {
            m.title: report.LearningCurve(*learning[1:], look_of(results, m))
            for m, learning in found.items()
        }
        seeds = {m.title: learning.seeds for m, learning in found.items()}
        references = SCORES[game]._asdict() if game in SCORES else {}
        beside = next((m.title for m in found if m.name == SCRATCH), None)
        figure = report.learning_curves(curves, f"score on {game}", references, beside)
        pictures.append(
            figures.picture(
                f"learning-{game}", figure, report.learning_table(curves, seeds, "method"),
                f"{game}, {results.label}: mean score of the evaluations with its {PERCENT} "
                "bootstrap band; thin lines are seeds, dotted is the mean from scratch"
                f"{', grey are actions drawn at random and a human' * bool(references)}.",
                f"Learning curves of each method on {game}",
            )
        )  # fmt: skip
    return report.Section(game, "", [table, *pictures])


def _bars_caption(results: Results, game: str) -> str:
    what = "Human-normalised scores (0: random, 100: human)" if game in SCORES else "Raw scores"
    return (
        f"{what}: mean over seeds, circles are seeds, whiskers {PERCENT} bootstrap intervals over "
        "seeds."
    )


def score_bars(results: Results, game: str):
    """Bars of the methods on a game: human-normalised in percent, raw where no human played."""
    rows, decimals = results.rows(game), _decimals(results.rows(game))

    def scaled(value: float) -> float:
        return 100 * human_normalized(value, game) if game in SCORES else value

    bars = [
        _bar(
            results, row.method, row.mean and Interval(*map(scaled, row.mean)), note="not finished"
        )
        for row in rows
    ]
    bars = [
        bar._replace(points=[scaled(v) for v in row.scores.values()])
        for bar, row in zip(bars, rows, strict=True)
    ]
    columns = {"score": [_score(row, decimals) for row in rows]}
    label = f"score on {game}"
    if game in SCORES:
        label = f"human-normalised score on {game}, %"
        shares = [f"{scaled(row.mean.value):.1f} %" if row.mean else "–" for row in rows]
        columns["human-\nnormalised"] = shares
    if results.missing:
        columns["seeds"] = [str(len(row.scores)) for row in rows]
    return report.interval_bars(bars, label, columns, {"human": 100.0} if game in SCORES else None)


def _over_games(results: Results, figures: report.FigureFolder) -> list[report.Section]:
    totals, games = results.totals(), results.common_games
    if not totals:
        return []
    table, where = totals_table(totals), f"{', '.join(games)}; {results.label}"
    pictures = []
    if totals[0].mean is not None:
        figure, caption = _means_over_games(results, totals, where)
        alt = "Interquartile mean of each method with its interval"
        pictures.append(figures.picture("interquartile-mean", figure, table, caption, alt))
    rivals = [total for total in totals if total.improvement is not None]
    if rivals:
        figure, caption = _improvements_over_games(results, rivals, where)
        alt = "Probability of improvement over scratch of each method with its interval"
        pictures.append(figures.picture("probability-of-improvement", figure, table, caption, alt))
    left = [game for game in results.asked.targets if game not in games]
    text = f"Without {', '.join(left)}, where a method has no finished run." if left else ""
    return [report.Section("Over all games" if not left else "Over games", text, pictures)]


def _means_over_games(results: Results, totals: Sequence[Total], where: str):
    """(figure, its caption)."""
    figure = report.interval_bars(
        [_bar(results, t.method, Interval(*(100 * v for v in t.mean))) for t in totals],
        "interquartile mean of human-normalised scores, %",
        {
            "mean": [f"{100 * t.mean.value:.1f} %" for t in totals],
            "values": [str(t.count) for t in totals],
        },
        {"random": 0.0, "human": 100.0},
        base=0.0,
    )
    counts = sorted({total.count for total in totals})
    values = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    trimmed = "" if counts[0] >= 4 else " Of fewer than four values it is the plain mean."
    return figure, (
        f"Interquartile mean over games x seeds ({values} values: {where}), with its {PERCENT} "
        f"bootstrap interval, stratified by game.{trimmed}"
    )


def _improvements_over_games(results: Results, rivals: Sequence[Total], where: str):
    """(figure, its caption)."""
    figure = report.interval_bars(
        [_bar(results, t.method, t.improvement) for t in rivals],
        "probability of improvement over scratch",
        {"probability": [f"{t.improvement.value:.2f}" for t in rivals]},
        {"even": 0.5},
        base=0.5,
        limits=(-0.02, 1.02),
    )
    return figure, (
        "How probable it is that a run of the method scores higher than a run from scratch on the "
        f"same game (Mann-Whitney, ties 1/2; mean over {where}), with its {PERCENT} bootstrap "
        "interval."
    )


def _bar(
    results: Results, method: Method, found: Interval | None, note: str = ""
) -> report.IntervalBar:
    found = found or (None,)
    return report.IntervalBar(method.title, *found, look=look_of(results, method), note=note)


def _three(found: Interval | None) -> list[float | None]:
    return [None] * 3 if found is None else list(found)


def _decimals(rows: Sequence[Row]) -> int:
    """Of scores: two where all are below 10, as those of small games."""
    largest = max((abs(v) for row in rows for v in row.scores.values()), default=0.0)
    return 2 if largest < 10 else 1


def _score(row: Row, decimals: int) -> str:
    if row.mean is None:
        return "–"
    spread = "" if row.deviation is None else f" ± {row.deviation:,.{decimals}f}"
    return f"{row.mean.value:,.{decimals}f}{spread}"


def _difference(found: Interval | None, decimals: int) -> str | None:
    if found is None:
        return None
    text = f"{found.value:+,.{decimals}f}"
    if math.isnan(found.low):
        return text
    word = verdict(found)
    interval = f"[{found.low:+,.{decimals}f}, {found.high:+,.{decimals}f}]"
    return f"{text} {interval}{', ' * bool(word)}{word}"


LOOKS = {HUB: 0, HUB_K1: 4, KNOWLEDGE_FLOW: 3, ZOO_TUNING: 5, SCRATCH: 6}


def look_of(results: Results, method: Method) -> int:
    """The same in all figures; sources have what is left, in their order."""
    if method.name in LOOKS:
        return LOOKS[method.name]
    left = [i for i in range(len(LOOKS) + len(results.methods)) if i not in LOOKS.values()]
    return left[results.asked.settings.sources.index(method.sources[0])]


def title(results: Results) -> str:
    """The page's."""
    partial = ", partial" if results.missing else ""
    return f"{', '.join(results.asked.targets)}: {results.label}{partial}"


def subtitle(results: Results) -> str:
    hours = sum(o.seconds for o in (*results.outcomes.values(), *results.sources.values())) / 3600
    hub = ", ".join(results.asked.settings.sources)
    steps = short_steps(results.asked.settings.steps)
    return (
        f"A hub of policies of {hub}; {len(results.outcomes)} runs of {steps} steps and their "
        f"sources, {hours:.1f} hours of playing and learning in all."
    )
