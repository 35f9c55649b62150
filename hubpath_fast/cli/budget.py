"""``hubpath budget``, and the options by which other commands follow a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .fit import Device, Folder
from .messages import console, messages, say

if TYPE_CHECKING:
    from rich.table import Table


def budget(
    run: Folder,
    device: Device = "cpu",
    data_root: Annotated[
        Optional[Path],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Option(help="where the run's own data set lies now"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="images at a time, for the milliseconds", min=1)
    ] = 64,
) -> None:
    """What accuracy a run has for how many milliseconds an image, beside single models, ensembles
    and cascades. Nothing is trained.

    Writes RUN/budget.json and RUN/budget.png (and .svg). Policies are chosen on validation images;
    `hubpath evaluate RUN --budget-ms B` and `hubpath predict RUN IMAGES --budget-ms B` then follow
    the one of the largest budget up to B.
    """
    with messages():
        from ..recipes.budget import BUDGET, PICTURES
        from ..recipes.budget import budget as recipe

        result = recipe(run, device, data_root, batch_size, lambda text: say(text))
        console.print(table(result))
        for line in sentences(result):
            say(line)
        say(f"written: {', '.join(str(run / name) for name in (BUDGET, *PICTURES))}")


def table(result: dict[str, Any]) -> Table:
    """What ``budget_table`` has, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    from ..report.figures.budget import budget_table
    from ..tasks import Classification

    rows = budget_table(result, Classification.metric)
    shown = Table(*rows.columns[:1])
    for head in rows.columns[1:]:
        shown.add_column(head.replace(" ", "\n", 1), justify="right")
    for i in range(len(rows.rows)):
        shown.add_row(*(escape(rows.text(i, j)) for j in range(len(rows.columns))))
    return shown


def sentences(result: dict[str, Any]) -> list[str]:
    """Whether single experts do better than the hub at a budget, on validation images."""
    count, said = len(result["curve"]), []
    for costs_more, whose in ((False, "costs no more"), (True, "costs more")):
        found = [row for row in result["singles_above"] if row["costs_more"] == costs_more]
        budgets = sorted({row["budget"] for row in found})
        where = "" if not found else f" ({', '.join(f'{most:.3g} ms' for most in budgets)})"
        said.append(
            f"at {len(budgets)} of {count} budgets{where} a single expert that {whose} than the "
            "hub does there is better on validation images"
        )
    return said
