"""The comparison's table: a row a method over all seeds, as JSON, Markdown and HTML."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from .. import report
from ..files import write_json, write_text
from ..hub import expert_sources
from ..hub.labels import legend
from ..measure import Measure
from ..report.sections import initial
from ..runs.build import kind_of_task
from .methods import Method
from .paper import notes_on_figures, numbers_beside
from .results import COSTS, RunFailed, SeedResults
from .routing import routing_notes
from .settings import STEPS, CompareSettings, names_of_experts

TABLE = "table"
MEANS = (
    "train_seconds", *COSTS, "peak_memory_mb", "train_forwards_per_sample", "train_steps",
    "train_forwards", "router_share",
)  # fmt: skip
DONE, FAILED, CANNOT = "done", "failed", "cannot run on this hub"
BARRED = "cannot run under this budget"


def make_rows(
    settings: CompareSettings, methods: Sequence[Method], seeds: Sequence[int], out_dir: Path
) -> list[dict[str, Any]]:
    """The rows of ``table.json``.

    method, title, dataset, status (DONE, FAILED, CANNOT or BARRED, in words) and reason; mean
    and std (of a sample: n - 1; 0 for one seed) of the task's metric on the test samples, of the
    seeds that are done; those seeds, and the values as "accuracies"; and, as means over them,
    train_seconds (of the runs at the chosen rates, with those that a method learns from or votes
    with), train_forwards_per_sample (of a training step, likewise), train_steps (updates of each
    network that was trained for it), train_forwards (expert forwards of all these trainings; null
    where it is not known), forwards_per_sample, gflops_per_sample, milliseconds_per_sample (at
    inference), router_share (of a Hub-Pathway: its router's FLOPs over those of K mean experts;
    null of others), peak_memory_mb (of training). also: means of the task's other measures, by
    name, where it has some. rates: the chosen rates, seed by seed. k: of a Hub-Pathway as the paper
    has it, else null. paper: the paper's own mean and std, or null. bound: does not compete. best:
    whether it is the best.
    """
    results = [SeedResults(out_dir, seed, settings.rates) for seed in seeds]
    published = numbers_beside(settings.fit)
    rows = [_row(method, results, settings, published) for method in methods]
    rivals = [row["mean"] for row in rows if row["mean"] is not None and not row["bound"]]
    best = results[0].task.metric.best(rivals) if rivals else None
    for row in rows:
        row["best"] = row["mean"] is not None and not row["bound"] and row["mean"] == best
    return rows


def _row(
    method: Method,
    results: Sequence[SeedResults],
    settings: CompareSettings,
    published: Mapping[str, dict[str, float]],
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": method.name,
        "title": method.title,
        "dataset": settings.fit.data_name,
        "status": DONE,
        "reason": None,
        "k": method.k,
        "bound": method.bound,
        "paper": published.get(method.paper),
    }
    difference = results[0].problem["difference"]
    found: dict[int, dict[str, Any]] = {}
    if method.barred:
        row |= {"status": BARRED, "reason": method.barred}
    elif method.equal and difference is not None:
        row |= {"status": CANNOT, "reason": difference}
    else:
        for seed_results in results:
            try:
                found[seed_results.seed] = _of_seed(method, seed_results, settings)
            except RunFailed as error:
                row |= {"status": FAILED, "reason": f"seed {seed_results.seed}: {error}"}
    entries = list(found.values())
    values = [entry["value"] for entry in entries]
    row |= {
        "mean": statistics.fmean(values) if found else None,
        "std": (statistics.stdev(values) if len(found) > 1 else 0.0) if found else None,
        "seeds": list(found),
        "accuracies": values,
        "rates": [entry["rates"] for entry in entries],
    }
    if names := [measure.name for measure in also(settings)]:
        found_also = [entry["also"] for entry in entries]
        row["also"] = {name: _mean([one[name] for one in found_also]) for name in names}
    means = MEANS if entries else MEANS[:1]
    return row | {name: _mean([entry[name] for entry in entries]) for name in means}


def _of_seed(method: Method, results: SeedResults, settings: CompareSettings) -> dict[str, Any]:
    """A method on one seed. The members of a vote are asked one after another, and all that it
    needs was trained for it."""
    asked = [results.result(run) for run in method.asked(results)]
    trained = [results.result(run) for run in method.needs]
    names = [measure.name for measure in also(settings)]
    if method.train is None:
        scores = method.scores(results)
        value, more = scores.mean().item(), results.task.summary(scores) if names else {}
    else:
        [own] = asked
        for run, rate in own.get("after", {}).items():  # a rate that had failed may be best now
            if results.result(run)["rate"] != rate:
                raise RunFailed(
                    f"{method.run} came after {run} at rate {rate:g}, and another is chosen now; "
                    f"delete {results.folder(method.run)} and compare again"
                )
        value, trained = own["test"][results.task.metric.name], [*trained, own]
        more = {name: own["test"][name] for name in names}
    samples = settings.steps() * settings.fit.trainer.batch_size
    alone = method.train is not None and not method.together  # its memory is what it trained in
    return {
        "value": value,
        "also": more,
        "rates": [result["rate"] for result in asked],
        "train_seconds": sum(result["train_seconds"] for result in trained),
        "train_forwards_per_sample": method.forwards,
        "train_steps": max(result.get("train_steps", settings.steps()) for result in trained),
        "train_forwards": _sum([_train_forwards(result, samples) for result in trained]),
        "router_share": asked[0].get("router_share") if method.train else None,
        **{name: _sum([result[name] for result in asked]) for name in COSTS},
        "peak_memory_mb": _largest(
            [result["peak_memory_mb"] for result in (asked if alone else trained)]
        ),
    }


def _train_forwards(result: dict[str, Any], samples: int) -> float | None:
    """Of a run. samples: of its training, by which runs of earlier versions are counted: they all
    took the settings' steps."""
    if "train_forwards" in result:
        return result["train_forwards"]
    forwards = result.get("train_forwards_per_sample")
    return None if forwards is None else forwards * samples


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values)


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


COSTS_SHOWN = (
    ("forwards_per_sample", "forwards / image", ".3g"),
    ("gflops_per_sample", "GFLOPs / image", ".3g"),
    ("milliseconds_per_sample", "ms / image", ".3g"),
    ("train_seconds", "training, s", ".0f"),
    ("train_forwards_per_sample", "forwards / step", ".3g"),
    ("peak_memory_mb", "memory, MB", ".0f"),
    ("train_steps", "updates", ",.0f"),
    ("train_forwards", "forwards in training", report.short_count),
    ("router_share", "router / K experts", ".1%"),
)
# Besides what a method reaches: what it asks of a user, and what of the budget.
IN_TERMINAL = ("forwards / image", "updates", "forwards in training", "training, s")


def also(settings: CompareSettings) -> tuple[Measure, ...]:
    """What the task is measured by besides its metric, if anything."""
    return getattr(kind_of_task(settings.fit), "other_measures", ())


def as_table(
    rows: Sequence[dict[str, Any]], measure: Measure, more: Sequence[Measure] = ()
) -> report.Table:
    """The rows for readers: the best in bold, reasons where a method has no figure. more: see
    ``also``."""
    columns = {
        "method": [r["title"] + (f" ({r['status']})" if r["reason"] else "") for r in rows],
        measure.label: [row["mean"] for row in rows],
        "spread": [row["std"] if len(row["seeds"]) > 1 else None for row in rows],
    }
    columns |= {m.label: [row["also"][m.name] for row in rows] for m in more}
    columns |= {column: [row.get(key) for row in rows] for key, column, _ in COSTS_SHOWN}
    formats: dict[str, Any] = {column: form for _, column, form in COSTS_SHOWN}
    formats |= {measure.label: measure.number, "spread": measure.number}
    formats |= {m.label: m.number for m in more}
    if any(row["paper"] is not None for row in rows):
        unit = f", {measure.unit}" if measure.unit else ""
        columns[f"paper{unit}"] = [row["paper"] and row["paper"]["mean"] for row in rows]
        formats[f"paper{unit}"] = lambda value: f"{measure.scale * value:.2f}"
    table = report.Table(list(columns), list(zip(*columns.values(), strict=True)), formats=formats)
    bounds = [i for i, row in enumerate(rows) if row["bound"]]
    best = report.best_cells(table, measure.label, measure.better == "max", bounds)
    table.highlight = [(i, j) for i, _ in best for j in (0, 1)]
    return table


def terminal_table(table: report.Table, note: str) -> Table:
    """What of it fits a terminal of 80 columns. note: stands below."""
    shown = Table(caption=escape(note), caption_justify="left")
    costs = [list(table.columns).index(column) for column in IN_TERMINAL]
    for j in (0, 1, *costs):
        head = table.columns[j].replace(" / ", "\n/\u00a0").replace(" ", "\n")
        shown.add_column(head, justify="right" if j else "left")
    for i in range(len(table.rows)):
        value, spread = table.text(i, 1), table.rows[i][2]
        value += "" if spread is None else f" ± {table.text(i, 2)}"
        cells = [table.text(i, 0), value, *(table.text(i, j) for j in costs)]
        style = "bold" if table.is_highlighted(i, 0) else None
        shown.add_row(*map(escape, cells), style=style)
    return shown


def reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for every reason why methods have no figure, or one of fewer seeds."""
    titles: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            titles.setdefault((row["status"], row["reason"]), []).append(row["title"])
    return [
        f"{status[0].upper()}{status[1:]}: {', '.join(names)}. {reason[0].upper()}{reason[1:]}."
        for (status, reason), names in titles.items()
    ]


def all_notes(
    settings: CompareSettings, rows: Sequence[dict[str, Any]], seeds: Sequence[int], out_dir: Path
) -> list[str]:
    """What stands below the table, a sentence or two each."""
    task = SeedResults(out_dir, seeds[0], settings.rates).task
    return [
        *notes_on_figures(settings.fit, task, any(row["paper"] for row in rows)),
        *reasons(rows),
        *routing_notes(settings, rows, seeds, out_dir),
    ]


def markdown(table: report.Table) -> str:
    """A table as Markdown, its highlighted cells in bold."""
    numeric = [j > 0 for j in range(len(table.columns))]
    lines = [_line(table.columns), _line(["---:" if n else "---" for n in numeric])]
    for i in range(len(table.rows)):
        cells = [table.text(i, j).replace("|", "\\|") for j in range(len(table.columns))]
        lines.append(
            _line([f"**{c}**" if (i, j) in table.highlight else c for j, c in enumerate(cells)])
        )
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_tables(
    out_dir: Path, settings: CompareSettings, rows: Sequence[dict[str, Any]], seeds: Sequence[int]
) -> report.Table:
    """Writes table.json, table.md and table.html; returns the table for readers."""
    fit = settings.fit
    task = SeedResults(out_dir, seeds[0], settings.rates).task
    measure = task.metric
    table = as_table(rows, measure, also(settings))
    write_json(
        out_dir / f"{TABLE}.json",
        {
            "dataset": settings.fit.data_name,
            **(task.facts() if hasattr(task, "facts") else {}),
            "hub": list(fit.hub),
            "seeds": list(seeds),
            "k": fit.k,
            "settings": settings.to_dict(),
            "rows": list(rows),
        },
    )
    heading = f"{settings.fit.data_name}, a hub of {len(fit.hub)}"
    split = SeedResults(out_dir, seeds[0], settings.rates).split
    budget = describe(settings, seeds, split)
    notes = all_notes(settings, rows, seeds, out_dir)
    parts = [f"# {heading}", budget, markdown(table).rstrip(), *notes]
    write_text(out_dir / f"{TABLE}.md", "\n\n".join(parts) + "\n")
    picture = report.Picture(
        report.measure_bars([bar_of(row) for row in rows], measure),
        f"{initial(split)} {measure.name}, mean over the seeds; whiskers: standard deviation.",
        f"{initial(split)} {measure.name} by method",
    )
    section = report.Section("All methods under one budget", budget, [table, *notes, picture])
    report.write_page(out_dir / f"{TABLE}.html", f"Comparison: {heading}", [section])
    return table


def retitled(row: dict[str, Any], methods: Sequence[Method]) -> dict[str, Any]:
    """A row of a stored table under its present title: earlier versions called experts in full."""
    titles = {name: method.title for method in methods for name in (method.full, method.name)}
    return {**row, "title": titles.get(row["method"], row["title"])}


def bar_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ``table.json`` as the report's figures take it."""
    return {
        "name": row["title"],
        "value": row["mean"],
        "spread": row["std"] if len(row["seeds"]) > 1 else None,
        "forwards": row.get("forwards_per_sample"),
        "gflops": row.get("gflops_per_sample"),
        "milliseconds": row.get("milliseconds_per_sample"),
        "updates": row.get("train_steps"),
        "train_forwards": row.get("train_forwards"),
        "router_share": row.get("router_share"),
        "bound": row["bound"],
        "note": row["status"],
    }


def describe(settings: CompareSettings, seeds: Sequence[int], split: str = "test") -> str:
    """A paragraph on what all methods share. split: that the figures are of."""
    fit = settings.fit
    hub = legend(expert_sources(fit.hub), names_of_experts(settings))
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    chosen = (
        f"each at the rate ({rates}) that was best on the validation images"
        if len(settings.rates) > 1
        else f"at a peak rate of {rates}"
    )
    count = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    chosen_on = "nothing is chosen" if split == "test" else "rates and experts are chosen, too"
    return (
        f"Hub: {', '.join(hub)}. K = {fit.k}. {describe_budget(settings)} Every method trains "
        f"{chosen}; {count}. Figures are of the {split} images, on "
        f"which {chosen_on}; bold is best, bounds (in hindsight, oracle) aside; spread is the "
        "standard deviation over seeds. Forwards are of experts: for an image at inference, for "
        "an image of a training step, and in training altogether; updates are those of each "
        "network. Forwards in training and training time hold those of the models which a method "
        "votes with or learns from, at the rates that were kept; memory is training's peak; router "
        "is its FLOPs for an image over those of K mean experts."
    )


def describe_budget(settings: CompareSettings) -> str:
    """A sentence on what is the same for all methods."""
    steps, batch, count = settings.steps(), settings.fit.trainer.batch_size, len(settings.fit.hub)
    first = " Heads first comes on top." if settings.fit.warm_up else ""
    if settings.budget == STEPS:
        return (
            f"Budget: steps, so every method takes the same {steps:,} updates of {batch} images, "
            f"however many experts an update runs.{first}"
        )
    forwards = report.short_count(count * steps * batch)
    return (
        "Budget: passes, so every method may run as many expert forwards in training as the "
        f"{count} experts trained alone for {steps:,} updates of {batch} images take together, "
        f"{forwards}; a Hub-Pathway, which runs fewer in an update, takes more updates, and one "
        f"expert alone only its share.{first}"
    )
