"""``hubpath shelf compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..messages import console, messages, say, stopped
from .arguments import HubFolder, ShelfFolder
from .notes import KEPT_HEADS, few_images, plain_table

if TYPE_CHECKING:
    from rich.table import Table


def compare(
    shelf: ShelfFolder,
    hub: HubFolder = None,
    k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="models that a rival asks about an image; default: the hub's K", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="random seed of folds and random sets")] = 0,
) -> None:
    """Compare the routed hub with other uses of the same models.

    They are the best one, the best K, all of them averaged or stacked, a kNN router, DESlib's
    KNORA-E and META-DES, random K, and the oracle.

    Writes SHELF/compare.json. All is chosen on validation images; without a hub a line says so.
    """
    with messages():
        from ...recipes.shelf_compare import COMPARE
        from ...recipes.shelf_compare import compare as recipe

        with stopped(KEPT_HEADS), console.status("") as status:
            result = recipe(shelf, hub, k, seed, status.update)
        console.print(rival_table(result))
        if (ahead := ahead_table(result)) is not None:
            console.print(ahead)
        for line in sentences(result):
            say(line)
        say(f"written: {shelf / COMPARE}")


def rival_table(result: dict[str, Any]) -> Table:
    """A row a rival: how good it is, and what it costs."""
    heads = ("", "test, %", "log-loss", "val, %", "forwards", "ms", "M params")
    shown = plain_table(f"{result['images']} {result['split']} images", heads, gap=2)
    for row in _answered(result):
        test, scored = row["test"], row[result["split"]]
        million = None if row["parameters"] is None else row["parameters"] / 1e6
        shown.add_row(
            _titled(row),
            _number(test and 100 * test["accuracy"], 1),
            _number(scored["loss"], 3),
            _number(row["validation"] and 100 * row["validation"]["accuracy"], 1),
            _number(row["forwards"], 2),
            _number(row["ms"], 2),
            _number(million, 3),
        )
    return shown


def ahead_table(result: dict[str, Any]) -> Table | None:
    """By how much the hub is better than each; None: there is no hub."""
    shown = plain_table("", ("", "hub ahead, points", f"{100 * result['level']:.0f} % interval"))
    for row in _answered(result):
        if (ahead := row["ahead"]) is not None:
            ends = [f"{end:+.1f}" for end in ahead["interval"] or ()]
            shown.add_row(_titled(row), f"{ahead['points']:+.1f}", " to ".join(ends))
    return shown if shown.row_count else None


def _answered(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["reason"] is None]


def _titled(row: dict[str, Any]) -> str:
    from rich.markup import escape

    return escape(f"{row['title']} (a bound)" if row["bound"] else row["title"])


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def sentences(result: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    said = [f"{row['title']}: {row['reason']}" for row in result["rows"] if row["reason"]]
    said += [f"{row['title']}: {chosen_text(row)}" for row in result["rows"] if row["chosen"]]
    models, of_hub = result["models"], result["hub_models"]
    if of_hub is not None and of_hub < models:
        said.append(
            f"the routed hub chooses among {of_hub} models, the others among all {models} "
            "of the shelf"
        )
    said += [
        "forwards and ms: of an image, ms those of the models that run",
        "all is chosen on the validation images, so the column of these flatters",
    ]
    if any(row["ahead"] for row in result["rows"]):
        said.append("intervals: paired bootstrap")
    said += few_images(result["validation_images"], "validation", "all is chosen on")
    if result["split"] == "test":
        said += few_images(result["images"], "test", "scores are of")
    else:
        said.append("there are no test images of their own, so nothing confirms these figures")
    return said


def chosen_text(row: dict[str, Any]) -> str:
    """What validation chose of a rival."""
    chosen = row["chosen"]
    if row["name"] in ("single", "static"):
        return ", ".join(chosen["models"])
    if row["name"] == "random":
        return f"mean over {chosen['draws']} draws"
    if row["name"] == "stacked":
        return f"a {chosen['form']} of the models' probabilities, weight decay {chosen['decay']:g}"
    count = chosen["neighbours"]
    near = "1 neighbour" if count == 1 else f"{count} neighbours"
    pool = f"{chosen['models']} models, " if "models" in chosen else ""
    return f"{pool}{near} by {chosen['look']}"
