"""The sections of a run's analysis: each writes its figures and says in words what they show.

A section is None where the analysis lacks what it is about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures.cost import COSTS, cost_table, measure_against_cost, ranked
from .figures.curves import history_table, training_curves
from .figures.heat import mean_weights
from .figures.over_k import k_table, measure_over_k
from .figures.quality import quality_bars
from .figures.routing_bars import routing_bars, routing_table
from .figures.samples import samples_with_weights
from .figures.weights import weight_bars
from .folder import FigureFolder
from .page import Section
from .quality import quality_table, weight_quality
from .tables import Table, matrix_table

if TYPE_CHECKING:
    from .analysis import Analysis

GROUPS = 30  # lines of a figure or table by group; more would be a page of their own
SAMPLES = 15  # images shown, of them all groups alike
MISSED = 12


def file_name(text: str) -> str:
    return re.sub(r"\W+", "_", text)


def summary(a: Analysis, figures: FigureFolder) -> Section:
    means = a.scores_alone.mean(axis=1).tolist()
    best = a.measure.ranked(means)[0]
    text = (
        f"Hub-Pathway asks {a.k} of {count(len(a.expert_names), 'expert')} about each of "
        f"{count(len(a.scores), f'{a.split} sample')} of {a.data_name}; its {a.measure.title} is "
        f"{a.measure.text(a.scores.mean())}. Of the experts by themselves ({a.alone_title}), "
        f"{a.expert_names[best]} is best with {a.measure.text(means[best])}; with the best of them "
        f"for each sample it would be {a.measure.text(a.oracle.mean())}, the bound for whoever "
        "picks one expert a sample."
    )
    items: list[Any] = list(a.notes)
    if a.expert_sources and a.expert_sources != a.expert_names:
        rows = list(zip(a.expert_names, a.expert_sources, strict=True))
        items.append(Table(["expert", "model, file or folder"], rows))
    return Section("This run", text, items)


def mean_weight(a: Analysis, figures: FigureFolder) -> Section:
    mean, asked = a.weights.mean(axis=0), (a.weights > 0).mean(axis=0)
    columns = ["expert", "mean weight", "asked about (share of samples)"]
    table = Table(columns, [list(r) for r in zip(a.expert_names, mean, asked, strict=True)])
    items: list[Any] = [
        figures.picture(
            "mean_weight",
            weight_bars(mean, asked, a.expert_names),
            table,
            f"Mean weight of each expert on all {count(len(a.scores), f'{a.split} sample')} of "
            f"{a.data_name} (0 where it is not asked), and the share of samples it is asked about.",
            f"Bars: mean weight of each expert on the {a.split} data",
        )
    ]
    groups = a.members()
    if len(groups) > 1:
        matrix = np.array([a.weights[mask].mean(axis=0) for mask in groups.values()])
        names = list(groups)
        kept = largest(np.abs(matrix - mean).sum(axis=1), GROUPS)
        items.append(
            figures.picture(
                "mean_weight_by_group",
                mean_weights(matrix[kept], [names[i] for i in kept], a.expert_names, a.group_label),
                matrix_table(matrix, names, a.expert_names, a.group_label),
                f"Mean weight by {a.group_label}."
                + some(kept, names, "those whose weights differ most from the overall mean"),
                f"Heat map: mean weight of each expert by {a.group_label}",
            )
        )
    text = (
        "The average pathway weights (the paper's figure 3a). An expert that is asked about "
        "nearly nothing costs memory only; one that is asked about nearly everything means "
        "that the route hardly depends on the sample."
    )
    if a.routes is not None:
        text += f"\n\n{_routes(a, a.routes, f'{a.split} sample')}"
    return Section("Which experts are asked", text, items)


def quality(a: Analysis, figures: FigureFolder) -> Section:
    groups, text_of = a.members(), a.measure.text
    whole = weight_quality(a.weights, a.scores_alone, a.measure)
    text = f"Alone means: {a.alone_title}. "
    if a.measure.worst is not None:
        text += (
            f"Counted are the {whole.counted} of {count(whole.samples, f'{a.split} sample')} "
            f"({share(whole.counted / whole.samples)}) on which at least one expert alone is "
            f"better than the worst ({a.measure.title} {text_of(a.measure.worst)}). "
        )
    if not whole.counted:
        return Section("How good the weights are", text + "So there is nothing to compare.")
    text += (
        f"The expert of the largest weight has there {a.measure.title} {text_of(whole.top)}, one "
        f"drawn uniformly {text_of(whole.random)} (the mean over experts, nothing is drawn), the "
        f"best of those asked {text_of(whole.asked)}, the best of all (the oracle) "
        f"{text_of(whole.oracle)} (the paper's figure 3b)."
    )
    if whole.decisive:  # else they differ by rounding at most
        part = (whole.top - whole.random) / (whole.oracle - whole.random)
        text += (
            f" So the weights cover {share(part)} of the way from chance to the oracle."
            if part >= 0
            else " So the weights point to worse experts than chance does."
        )
    if whole.decisive and (whole.decisive < whole.counted or a.measure.worst is not None):
        text += (
            f"\n\nOn {whole.decisive} of the {whole.counted} the experts differ, so that the "
            "choice matters: there the expert of the largest weight has "
            f"{text_of(whole.decisive_top)}, a random one {text_of(whole.decisive_random)}, the "
            f"best one {text_of(whole.decisive_oracle)}."
        )
    names, qualities = [f"all {a.data_name}"], [whole]
    if len(groups) > 1:
        names += groups
        qualities += [
            weight_quality(a.weights[m], a.scores_alone[:, m], a.measure) for m in groups.values()
        ]
    lead = [a.measure.sign * (q.top - q.random) for q in qualities[1:]]
    kept = [0, *(i + 1 for i in largest(-np.nan_to_num(lead, nan=np.inf), GROUPS))]
    picture = figures.picture(
        "weight_quality",
        quality_bars([qualities[i] for i in kept], [names[i] for i in kept], a.measure),
        quality_table(qualities, names, a.group_label),
        f"Counted samples (n: how many){', over all and by ' * bool(names[1:])}"
        f"{a.group_label if names[1:] else ''}: {a.measure.title} of the expert of the largest "
        "weight and of one drawn uniformly."
        + some(kept[1:], names[1:], "those with the smallest lead"),
        f"Bars: {a.measure.title} of the top-weighted and of a random expert",
    )
    return Section("How good the weights are", text, [picture])


def routing(a: Analysis, figures: FigureFolder) -> Section | None:
    if not a.routing:
        return None
    found, title = a.routing, "Does routing pay?"
    text = f"{found['sentence'][0].upper()}{found['sentence'][1:]}."
    if "learned" not in found:  # nothing was held out to look at
        return Section(title, text)
    text += (
        " Nothing was trained for it: all are the experts as the run left them, asked about its "
        f"{count(found['images'], found['split'] + ' image')} through its aggregator."
    )
    if "fixed" in found:
        fixed = found["fixed"]
        sets = count(fixed["sets"], "set")
        text += (
            f" The fixed experts are the best of the {sets} that were tried, chosen on the same "
            "images, which favours them; their weights are the mean ones. Random routes ask as "
            "many experts, drawn for each image, with equal weights."
        )
    if found.get("kept") == "fixed":
        text += (
            "\n\nThis run keeps them in place of its router (--fallback fixed): all other figures "
            "of this page are of the fixed experts."
        )
    picture = figures.picture(
        "routing",
        routing_bars(found, a.measure),
        routing_table(found),
        f"{initial(a.measure.title)} on {found['split']} images; whiskers and intervals: 95 % "
        "of a bootstrap over the images. By how much learned routes are better: paired, ± one "
        "standard error.",
        "Bars: learned routes, the best fixed experts, random routes and each expert alone",
    )
    return Section(title, text, [picture])


def over_k(a: Analysis, figures: FigureFolder) -> Section | None:
    if not a.values_by_k:
        return None
    name = a.measure.title
    picture = figures.picture(
        file_name(f"{a.measure.name}_over_k"),
        measure_over_k(a.values_by_k, a.measure, a.k),
        k_table(a.values_by_k, a.measure),
        f"{initial(a.split)} {name} over K: the mean, and each seed where there are several.",
        f"Line: {a.split} {name} over the number of experts asked",
    )
    text = (
        "More experts a sample cost proportionally more at inference; whether they help is "
        "shown here (the paper's figure 3c)."
    )
    return Section(f"{initial(name)} over K", text, [picture])


def samples(a: Analysis, figures: FigureFolder) -> Section | None:
    if a.images is None:
        return None
    present = len(np.unique(a.groups))
    limit = present * (SAMPLES // present) if present < SAMPLES else SAMPLES
    shown = _spread(a.groups, np.arange(len(a.scores)), limit)
    caption = f"{initial(a.split)} samples with the experts asked and their weights"
    if present > 1:
        some = f" {limit} of {present}" if present > limit else " each"
        caption += f", by {a.group_label}: the first of{some}"
    picture = figures.picture(
        "samples",
        _pictures(a, shown),
        sample_table(a, shown),
        f"{caption}, not chosen by how they came out.",
        "Sample images with the weights of the experts that were asked",
    )
    text = "Which experts a sample is sent to (the paper's figure 4)."
    return Section("Samples and their weights", text, [picture])


def training(a: Analysis, figures: FigureFolder) -> Section | None:
    if not a.history:
        return None
    picture = figures.picture(
        "training",
        training_curves(a.history, a.expert_names, a.measure),
        history_table(a.history),
        "The training, step by step.",
        f"Curves of losses, {a.measure.title}, load and entropy over the steps of training",
    )
    text = (
        "Load is the share of rows (pairs of a sample and an expert asked about it) that an "
        "expert got. Entropy is that of the mean routing, as a share of its largest value: "
        "near 0 the hub would have collapsed to one expert. Both are of training, whose noise "
        "spreads the samples."
    )
    evaluated = [record for record in a.history if record.get("routes")]
    if evaluated:
        routes = _routes(a, evaluated[-1]["routes"], "validation image")
        text += f"\n\nThe last evaluation, at step {evaluated[-1]['step']}, had no noise: {routes}"
    return Section("How the training went", text, [picture])


def cost(a: Analysis, figures: FigureFolder) -> Section | None:
    free = [r for r in a.rows if r.value is not None and r.forwards is None and r.gflops is None]
    rows, name = [row._asdict() for row in a.rows if row not in free], a.measure.title
    if all(row["value"] is None for row in rows):
        return None
    table = cost_table(rows, a.measure)
    cost = COSTS[ranked(rows, a.measure).cost].format("sample")
    text = (
        f"Cost is counted as {cost}. A method is on the Pareto front where no other is as good at "
        "less cost, or better at no more cost; bounds do not compete."
    )
    absent = [row.name for row in a.rows if row.value is None]
    if absent:
        text += f" Without {name}, so without a point: {', '.join(absent)}."
    if free:
        said = ", ".join(f"{row.name} ({a.measure.text(row.value)})" for row in free)
        text += f" Without a cost, for nothing is asked, so without a point, too: {said}."
    picture = figures.picture(
        file_name(f"{a.measure.name}_against_cost"),
        measure_against_cost(rows, a.measure),
        table,
        f"{initial(a.split)} {name} against cost; whiskers are the spread over seeds. Methods on "
        "the Pareto front have their names, the table has all.",
        f"Scatter plot of the methods' {a.split} {name} over their cost, with the Pareto front",
    )
    return Section(f"{initial(name)} against cost", text, [picture, table])


def missed(a: Analysis, figures: FigureFolder) -> Section:
    number, total = int(a.missed.sum()), len(a.scores)
    title = "Where an expert alone is better than the hub"
    text = (
        f"On {number} of {count(total, f'{a.split} sample')} ({share(number / total)}) some expert "
        f"alone ({a.alone_title}) has a better {a.measure.title} than Hub-Pathway"
    )
    if not number:
        return Section(title, text + ".")
    asked = (a.better.T & (a.weights > 0)).any(axis=1)[a.missed].sum()
    text += f"; on {asked} of these, a better expert was among those asked."
    items: list[Any] = [_missed_by_group(a)] if len(a.members()) > 1 else []
    # Those that lose most first; a group's samples keep their order among equals.
    loss = np.abs(a.oracle - a.scores)
    indices = np.flatnonzero(a.missed)
    indices = indices[np.argsort(-loss[indices], kind="stable")]
    table = sample_table(a, np.sort(indices))
    if a.images is None:
        figures.numbers("missed", table)
        return Section(title, text, items)
    shown = _spread(a.groups, indices, MISSED)
    caption = ("All" if len(shown) == number else f"{len(shown)} of the") + f" {number}"
    caption += f", in turn by {a.group_label}" if a.group_label else ""
    items.append(
        figures.picture(
            "missed",
            _pictures(a, shown, a.better.T[shown]),
            table,
            f"{caption}, where most is lost first: the experts that were asked, with their "
            "weights, and those that were not but are better (✓ alone better than Hub-Pathway, "
            "✗ not better).",
            "Samples on which an expert alone is better, with the experts that are",
        )
    )
    return Section(title, text, items)


def _pictures(a: Analysis, shown: np.ndarray, better: np.ndarray | None = None) -> Any:
    kinds = a.kinds
    return samples_with_weights(
        a.images(shown),
        a.weights[shown],
        a.expert_names,
        [a.heads[i] for i in shown],
        a.marked[shown],
        [kinds[i] for i in shown] if a.shows_groups else None,
        better,
        None if a.marks is None else a.marks[shown],
    )


def _missed_by_group(a: Analysis) -> Table:
    groups = a.members()
    rows = [
        [
            name,
            int(m.sum()),
            float(a.scores[m].mean()),
            float(a.oracle[m].mean()),
            int(a.missed[m].sum()),
            float(a.missed[m].mean()),
        ]
        for name, m in groups.items()
    ]
    kept = largest(np.array([row[-1] for row in rows]), GROUPS)
    hub, oracle = (f"{who}: {a.measure.label}" for who in ("Hub-Pathway", "best expert"))
    part = "share of samples"
    return Table(
        [a.group_label, "samples", hub, oracle, "an expert alone is better", part],
        [rows[i] for i in kept],
        formats={**dict.fromkeys((hub, oracle), a.measure.number), part: share},
        caption=f"By {a.group_label}."
        + some(kept, list(groups), "those with the largest share of samples", csv=False),
    )


def sample_table(a: Analysis, indices: np.ndarray) -> Table:
    """Samples by their index in the split: what the task says of them, scores and weights."""
    group = {a.group_label: a.kinds} if a.shows_groups else {}
    columns: dict[str, Sequence[Any]] = group | dict(a.details) | {a.measure.title: a.scores}
    columns |= {f"weight of {name}": a.weights[:, m] for m, name in enumerate(a.expert_names)}
    columns |= {f"{name} alone": a.scores_alone[m] for m, name in enumerate(a.expert_names)}
    rows = [[i, *(cells[i] for cells in columns.values())] for i in indices.tolist()]
    return Table(["sample", *columns], rows)


def _routes(a: Analysis, routes: Mapping[str, Any], what: str) -> str:
    """How many routes there are, and what they have to do with the groups."""
    sets, k = routes["sets"], round(sum(routes["share"]))
    shares = ", ".join(
        f"{name} {share(part)}" for name, part in zip(a.expert_names, routes["share"], strict=True)
    )
    text = f"{count(sets, 'different set')} of {count(k, 'expert')} ({shares} of the {what}s)"
    information = routes.get("mutual_information")
    if information is not None:
        text += f"; the mutual information of route and class is {information:.2f} nats"
    return text + "."


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def initial(text: str) -> str:
    """With a capital letter at the start."""
    return text[:1].upper() + text[1:]


def share(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def largest(values: np.ndarray, limit: int) -> list[int]:
    """Positions of the ``limit`` largest (earlier ones first among equals), in their own order."""
    return sorted(np.argsort(-values, kind="stable")[:limit].tolist())


def some(kept: Sequence[int], names: Sequence[str], which: str, csv: bool = True) -> str:
    """What a caption says where not all are shown."""
    if len(kept) == len(names):
        return ""
    return f" Shown are {len(kept)} of {len(names)}: {which}." + " The CSV has all." * csv


def _spread(groups: np.ndarray, indices: np.ndarray, limit: int) -> np.ndarray:
    """At most ``limit`` of the indices: the first of each group, then the second ones, and so on,
    ordered by group. Where there are more groups than that, groups at equal distances."""
    present = np.unique(groups[indices])
    if len(present) > limit:
        present = present[np.linspace(0, len(present) - 1, limit).round().astype(int)]
    turns = {int(g): indices[groups[indices] == g].tolist() for g in present}
    order = [(turn, g, i) for g, queue in turns.items() for turn, i in enumerate(queue)]
    return np.array(sorted((g, i) for _, g, i in sorted(order)[:limit]), np.int64)[:, 1]
