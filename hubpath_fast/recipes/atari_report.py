"""``hubpath atari report``: what a comparison or a run says, as far as it is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import report
from ..compare.tables import markdown
from ..files import write_json, write_text
from ..tasks.atari import report as pages
from ..tasks.atari.comparison import COMPARE_FILE, read_asked
from ..tasks.atari.results import Results, read_results
from ..tasks.atari.run_report import run_sections
from ..tasks.atari.sources import LAST
from ..written import GAME, described

PAGE, FIGURES, TABLE = "report.html", "figures", "table"


def report_atari(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes ``report.html`` and ``figures/``, of a comparison also ``table.md`` and
    ``table.json``; returns the page.

    folder: of a comparison, or of one run. out: None: ``report`` in it.

    Raises ValueError where nothing is finished, or for another folder or a damaged one.
    """
    folder = Path(folder)
    out = folder / "report" if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; give a folder")
    asked = read_asked(folder)
    if asked is not None:
        return write_report(read_results(folder, asked), out)
    made = run_sections(folder, report.FigureFolder(out / FIGURES))
    if made is None:
        there = f"it has no {COMPARE_FILE} and no {LAST}"
        there = there if folder.is_dir() else "there is no such folder"
        raise ValueError(
            described(folder, GAME)
            or f"{folder} is no folder of `hubpath atari compare` or `fit`: {there}; give the "
            "--out of one"
        )
    return report.write_page(out / PAGE, *made)


def write_report(results: Results, out: Path) -> Path:
    """Writes the page and what stands beside it."""
    figures = report.FigureFolder(out / FIGURES)
    sections = pages.sections(results, figures)
    title = f"Comparison on {pages.title(results)}"
    write_text(out / f"{TABLE}.md", _markdown(results, title))
    write_json(out / f"{TABLE}.json", as_json(results))
    return report.write_page(out / PAGE, title, sections, pages.subtitle(results))


def _markdown(results: Results, title: str) -> str:
    parts = [f"# {title}", *pages.introduction(results)]
    tables = [pages.game_table(results, game) for game in results.asked.targets]
    for table in (pages.sources(results), *tables):
        if table.rows:
            parts += [table.caption, markdown(table).rstrip()]
    return "\n\n".join(parts) + "\n"


def as_json(results: Results) -> dict[str, Any]:
    """All numbers by name; null where there is none."""

    def rows(table: report.Table) -> list[dict[str, Any]]:
        return [
            {name: None if v != v else v for name, v in zip(table.columns, row, strict=True)}
            for row in table.rows
        ]

    asked = results.asked
    return {
        "settings": asked.settings.to_dict(),
        "label": results.label,
        "targets": list(asked.targets),
        "methods": list(asked.methods),
        "seeds": list(asked.seeds),
        "missing": [[game, method.name, seed] for game, method, seed in results.missing],
        "failures": results.failures,
        "sources": rows(pages.sources(results)),
        "rows": rows(pages.scores_table(results, asked.targets)),
        "over_games": {
            "games": results.common_games,
            "rows": rows(pages.totals_table(results.totals())),
        },
    }
