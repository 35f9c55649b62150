"""The comparison's table: a row a method over all seeds, as JSON, Markdown and HTML."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import report
from ..files import write_bytes, write_json
from ..tasks.classification import ACCURACY
from .methods import Entry, Method
from .paper import paper_numbers
from .results import RunFailed, SeedResults
from .settings import CompareSettings

TABLE = "table"
DONE, FAILED, CANNOT = "done", "failed", "cannot run on this hub"


def make_rows(
    settings: CompareSettings, methods: Sequence[Method], seeds: Sequence[int], out_dir: Path
) -> list[dict[str, Any]]:
    """The rows of ``table.json``.

    method, title, dataset, status ("done", "failed" or "cannot run on this hub") and reason; mean
    and std (of a sample: n - 1; 0 for one seed) of the test accuracies (0..1) of the seeds that are
    done, those seeds and accuracies; and, as means over them, train_seconds (of the runs at the
    chosen rates, with those that a method learns from or votes with), train_forwards_per_sample (of
    a training step, likewise), forwards_per_sample, gflops_per_sample, milliseconds_per_sample (at
    inference), peak_memory_mb (of training). rates: the chosen rates, seed by seed. paper: the
    paper's own mean and std, or null. bound: does not compete. best: whether it is the best.
    """
    results = [SeedResults(out_dir, seed, settings.rates) for seed in seeds]
    published = paper_numbers(settings.fit.hub, settings.fit.dataset)
    rows = [_row(method, results, settings, published) for method in methods]
    rivals = [row["mean"] for row in rows if row["mean"] is not None and not row["bound"]]
    for row in rows:
        row["best"] = row["mean"] is not None and not row["bound"] and row["mean"] == max(rivals)
    return rows


def _row(method, results, settings, published) -> dict[str, Any]:
    paper = next((published[name] for name in _paper_names(method) if name in published), None)
    row: dict[str, Any] = {
        "method": method.name,
        "title": method.title,
        "dataset": settings.fit.data_name,
        "status": DONE,
        "reason": None,
        "bound": method.bound,
        "paper": paper,
    }
    difference = results[0].problem["difference"]
    entries: dict[int, Entry] = {}
    if method.equal and difference is not None:
        row |= {"status": CANNOT, "reason": difference}
    else:
        for seed_results in results:
            try:
                entries[seed_results.seed] = method.entry(seed_results)
            except RunFailed as error:
                row |= {"status": FAILED, "reason": f"seed {seed_results.seed}: {error}"}
    found = list(entries.values())
    accuracies = [entry.accuracy for entry in found]
    row |= {
        "mean": statistics.fmean(accuracies) if found else None,
        "std": (statistics.stdev(accuracies) if len(found) > 1 else 0.0) if found else None,
        "seeds": list(entries),
        "accuracies": accuracies,
        "rates": [list(entry.rates) for entry in found],
        "train_seconds": _mean([entry.train_seconds for entry in found]),
    }
    names = list(found[0].costs) if found else []
    return row | {name: _mean([entry.costs[name] for entry in found]) for name in names}


def _paper_names(method: Method) -> tuple[str, ...]:
    if method.name.startswith("single:"):
        return tuple(method.runs(0, 0))
    return method.paper


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


COLUMNS = (
    ("method", None),
    ("accuracy, %", ".1f"),
    ("spread", ".1f"),
    ("forwards / image", ".3g"),
    ("GFLOPs / image", ".3g"),
    ("ms / image", ".3g"),
    ("training, s", ".0f"),
    ("forwards / step", ".3g"),
    ("memory, MB", ".0f"),
    ("paper, %", ".2f"),
)


def as_table(rows: Sequence[dict[str, Any]]) -> report.Table:
    """The rows for readers: the best in bold, reasons where a method has no figure."""
    cells = [_cells(row) for row in rows]
    columns = [name for name, _ in COLUMNS]
    if all(row["paper"] is None for row in rows):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    formats = {name: form for name, form in COLUMNS if form is not None and name in columns}
    table = report.Table(columns, cells, formats=formats)
    shown = [row["mean"] is not None and f"{100 * row['mean']:.1f}" for row in rows]
    best = next((s for s, row in zip(shown, rows, strict=True) if row["best"]), None)
    table.highlight = [
        (i, j)
        for i, row in enumerate(rows)
        for j in (0, 1)
        if best is not None and shown[i] == best and not row["bound"]
    ]
    return table


def _cells(row: dict[str, Any]) -> list[Any]:
    title = row["title"] + (f" ({row['status']})" if row["reason"] else "")
    accuracy = None if row["mean"] is None else 100 * row["mean"]
    spread = 100 * row["std"] if len(row["seeds"]) > 1 else None
    costs = [
        row.get(name)
        for name in (
            "forwards_per_sample",
            "gflops_per_sample",
            "milliseconds_per_sample",
            "train_seconds",
            "train_forwards_per_sample",
            "peak_memory_mb",
        )
    ]
    paper = None if row["paper"] is None else 100 * row["paper"]["mean"]
    return [title, accuracy, spread, *costs, paper]


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


def markdown(table: report.Table) -> str:
    """A table as Markdown, its highlighted cells in bold."""
    numeric = [j > 0 for j in range(len(table.columns))]
    lines = [
        _line(table.columns),
        _line(["---:" if n else "---" for n in numeric]),
    ]
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
    table = as_table(rows)
    write_json(
        out_dir / f"{TABLE}.json",
        {
            "dataset": settings.fit.data_name,
            "hub": list(fit.hub),
            "seeds": list(seeds),
            "k": fit.k,
            "settings": settings.to_dict(),
            "rows": list(rows),
        },
    )
    heading = f"{settings.fit.data_name}, a hub of {len(fit.hub)}"
    budget = describe(settings, seeds)
    notes = reasons(rows)
    parts = [f"# {heading}", budget, markdown(table).rstrip(), *notes]
    write_bytes(out_dir / f"{TABLE}.md", ("\n\n".join(parts) + "\n").encode())
    bars = report.measure_bars(
        [
            {
                "name": row["title"],
                "value": row["mean"],
                "spread": row["std"] if len(row["seeds"]) > 1 else None,
                "forwards": row.get("forwards_per_sample"),
                "bound": row["bound"],
                "note": row["status"],
            }
            for row in rows
        ],
        ACCURACY,
    )
    picture = report.Picture(
        bars, "Test accuracy, mean over the seeds; whiskers: standard deviation.",
        "Test accuracy by method",
    )  # fmt: skip
    section = report.Section("All methods under one budget", budget, [table, *notes, picture])
    report.write_page(out_dir / f"{TABLE}.html", f"Comparison: {heading}", [section])
    return table


def describe(settings: CompareSettings, seeds: Sequence[int]) -> str:
    """A paragraph on what all methods share."""
    fit, trainer = settings.fit, settings.fit.trainer
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    chosen = (
        f"each at the rate ({rates}) that was best on the validation images"
        if len(settings.rates) > 1
        else f"at a peak rate of {rates}"
    )
    count = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    return (
        f"Hub: {', '.join(fit.hub)}. K = {fit.k}. Every method trains for {trainer.steps} steps of "
        f"{trainer.batch_size} images, {chosen}; {count}. Accuracies are on the test images, on "
        "which nothing is chosen; bold is best, bounds (in hindsight, oracle) aside; spread is the "
        "standard deviation over seeds. Forwards are of experts: for an image at inference, and "
        "for an image of a training step. Training time holds that of the models which a method "
        "votes with or learns from, at the rates that were kept; memory is training's peak."
    )
