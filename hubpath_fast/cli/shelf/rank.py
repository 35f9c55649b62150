"""``hubpath shelf rank``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ...sizes import parse_count
from ..messages import console, messages, say, stopped
from .arguments import ShelfFolder
from .notes import KEPT_HEADS, few_images, plain_table

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 32  # rows of the table; rank.json has all
SURE_MODELS = 30  # of fewer, chance alone makes a tau of a quarter and more


def rank(
    shelf: ShelfFolder,
    by: Annotated[
        Optional[str],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Option(help="linear, h_score, log_me, leep, nce or knn; default: linear"),
    ] = None,
    linear: Annotated[
        bool, typer.Option(help="fit linear heads, the yardstick; without them no set is chosen")
    ] = True,
    models: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="most models of a set; default: 16, or what the budgets allow", min=1),
    ] = None,
    parameters: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='most parameters of a set in all, such as "50M"'),
    ] = None,
    ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="most milliseconds an image of a set in all"),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="which set is shown: the one with the lowest validation loss of its models' mean "
            "(ensemble), or of the best of them for each image (routing)"
        ),
    ] = "ensemble",
    seed: Annotated[int, typer.Option(help="random seed of the folds of cross-validation")] = 0,
) -> None:
    """Score the models of a shelf, and choose sets of them.

    Scores take milliseconds a model; linear heads are what they are measured by; the models of a
    set help one another. Writes SHELF/rank.json, and the heads to SHELF/heads. Test images are not
    looked at.
    """
    with messages():
        from ...recipes.shelf_rank import RANK, has_linear
        from ...recipes.shelf_rank import rank as recipe
        from ...shelf.selection import Budget, check_objective

        check_objective(objective)
        limit = None if parameters is None else parse_count("parameters", parameters)
        given = (models, limit, ms) != (None, None, None)
        budget = Budget(models, limit, ms) if given else None
        replaced = not linear and has_linear(shelf)
        with stopped(KEPT_HEADS), console.status("") as status:
            result = recipe(shelf, by, linear, budget, seed, status.update)
        console.print(model_table(result))
        if (left := len(result["models"]) - SHOWN) > 0:
            say(f"and {left} more, see {shelf / RANK}")
        if linear:
            console.print(agreement_table(result))
        for line in sentences(result):
            say(line)
        if linear:
            console.print(set_table(result, objective))
            for line in set_sentences(result, objective):
                say(line)
        if replaced:
            say(f"{shelf / RANK} had a ranking with linear heads, which this one replaces")
            say("the heads are kept: without --no-linear it is soon made again")
        say(f"{result['seconds']:.1f} s; written: {shelf / RANK}")


def model_table(result: dict[str, Any]) -> Table:
    """The first models, for a terminal."""
    from rich.markup import escape

    names = _names(result)
    title = f"{len(result['models'])} models on {result['images']} training images"
    heads = ("rank", "model", *(_heads(name) for name in names))
    shown = plain_table(title, (*heads, "M\nparams", "ms an\nimage"), name=1, gap=1)
    for row in result["models"][:SHOWN]:
        figures = (_figure(name, row["scores"].get(name)) for name in names)
        shown.add_row(str(row["rank"]), escape(row["label"]), *figures, *_costs(row))
    return shown


def agreement_table(result: dict[str, Any]) -> Table:
    """How well each score foretells the linear heads, for a terminal."""
    best, agreement = result["best"], result["agreement"]
    recalled = any(found["recall"] is not None for found in agreement.values())
    recall = (f"best {best} in\nits first {result['top']}",) if recalled else ()
    heads = ("score", "models", "Kendall's tau", *recall, "seconds a model")
    shown = plain_table("Agreement of each score with the linear heads", heads)
    for name, found in agreement.items():
        share = found["recall"]
        figures = ["" if found["tau"] is None else f"{found['tau']:.2f}"]
        figures += ["" if share is None else f"{share * best:.0f}"] if recalled else []
        shown.add_row(_title(name), str(found["models"]), *figures, _seconds(result, name))
    blank = [""] * (1 + recalled)
    models = str(len(result["models"]))
    shown.add_row(_title("linear"), models, *blank, _seconds(result, "linear"))
    return shown


def sentences(result: dict[str, Any]) -> list[str]:
    """What to know of the scores."""
    if not result["agreement"]:
        return ["without linear heads it is not known how well the scores foretell them"]
    said = [
        f"linear head: accuracy in {result['folds']}-fold cross-validation on {result['images']} "
        "training images",
        "tau: 1 where a score puts models in the order of the linear heads, 0 by chance",
        "which score agrees best varies from one data set to another",
    ]
    fewest = min(found["models"] for found in result["agreement"].values())
    if 2 <= fewest < SURE_MODELS:
        said.append(
            f"of only {fewest} models tau says little: "
            f"by chance it is within ±{chance_tau(fewest):.2f} in 19 of 20 cases"
        )
    return said


def chance_tau(models: int) -> float:
    """Within which Kendall's tau of two random orders lies in 19 of 20 cases, by its variance."""
    variance = 2 * (2 * models + 5) / (9 * models * (models - 1))
    return min(1.0, 1.96 * math.sqrt(variance))


def set_table(result: dict[str, Any], objective: str) -> Table:
    """The models of a set in the order in which they were chosen, for a terminal."""
    from rich.markup import escape

    sets, accuracy = result["sets"], "accuracy" if objective == "ensemble" else "any right"
    best = sets["best"][objective]
    loss = "cross-validated" if sets["split"] == "train" else sets["split"]
    title = f"Greedy forward selection by {loss} loss; best: {_models(best)}"
    heads = ("models", "added", "log-loss", f"{accuracy}, %", "M params", "ms an image", "")
    shown = plain_table(title, heads, name=1, gap=2)
    for place, row in enumerate(sets[objective], 1):
        figures = f"{row['loss']:.4f}", f"{100 * row['accuracy']:.1f}"
        mark, style = ("best", "bold") if place == best else ("", "")
        added = escape(row["label"])
        shown.add_row(str(place), added, *figures, *_costs(row), mark, style=style)
    return shown


def set_sentences(result: dict[str, Any], objective: str) -> list[str]:
    sets = result["sets"]
    kind = "training" if sets["split"] == "train" else sets["split"]
    images = f"{sets['images']} {kind} image{'s' * (sets['images'] != 1)}"
    out = ", each by heads that did not see it" if sets["split"] == "train" else ""
    how = {
        "ensemble": ["each row: the mean of the probabilities of all models down to it"],
        "routing": [
            "each row: for every image the best of all models down to it, as an ideal router asks",
            "with more models this loss cannot rise",
        ],
    }[objective]
    return [
        *how,
        f"losses are those on {images}{out}",
        *few_images(sets["images"], kind, "sets are chosen on"),
    ]


def _models(count: int) -> str:
    return "1 model" if count == 1 else f"{count} models"


def _names(result: dict[str, Any]) -> list[str]:
    """Of the scores that any model has, the one that sorts first."""
    from ...shelf.ranking import SCORES, YARDSTICK

    have = {name for row in result["models"] for name in row["scores"]}
    names = [name for name in (YARDSTICK, *SCORES) if name in have]
    return sorted(names, key=lambda name: name != result["by"])


def _heads(name: str) -> str:
    """In two lines, where it is long."""
    before, _, last = _title(name).rpartition(" ")
    return f"{before.replace(' ', chr(10))} {last}" if " " in before else _title(name)


def _title(name: str) -> str:
    from ...shelf.ranking import SCORES

    return SCORES.get(name, "linear head, %")


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if name in ("linear", "knn") else f"{value:.3f}"


def _seconds(result: dict[str, Any], name: str) -> str:
    taken = [row["seconds"][name] for row in result["models"] if name in row["seconds"]]
    return f"{sum(taken) / len(taken):.3f}"


def _costs(row: dict[str, Any]) -> tuple[str, str]:
    parameters, ms = row["parameters"], row["ms"]
    return (
        "" if parameters is None else f"{parameters / 1e6:.3f}",
        "" if ms is None else f"{ms:.2f}",
    )
