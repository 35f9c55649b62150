"""``hubpath add``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .fit import Device, Folder
from .messages import console, messages, say

if TYPE_CHECKING:
    from rich.table import Table


def add(
    run: Folder,
    name: Annotated[str, typer.Argument(help="the newcomer; see `hubpath hub list`")],
    out: Annotated[Path, typer.Option(help="folder of the larger hub")],
    data: Annotated[
        Optional[Path],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Option(help="images that the newcomer is for, DATA/CLASS/IMAGE"),
    ] = None,
    steps: Annotated[int, typer.Option(help="of the fit, on stored features", min=1)] = 500,
    pretrained: Annotated[bool, typer.Option(help="load the newcomer's weights")] = True,
    device: Device = "cpu",
    data_root: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="where the run's own data set lies now"),
    ] = None,
) -> None:
    """Add a pre-trained model to a trained hub. RUN stays as it is, and so do predictions of images
    that the newcomer does not get.

    Its score and its head are fitted on the run's validation images; with --data on half of those
    and the run's training images. Other ones are chosen on, and others reported on. OUT opens by
    hubpath_fast.from_pretrained, `hubpath predict OUT` and `hubpath evaluate OUT --data DIR`.
    """
    with messages():
        from ..recipes.add import add as recipe

        result = recipe(run, name, out, data, device, data_root, steps, pretrained, say)
        console.print(table(result))
        kept = result["unchanged"]
        say(
            f"{kept['images']} of these images do not go to it; their probabilities changed by "
            f"at most {kept['largest_change']:.1g}"
        )
        say(
            f"{result['label']}: fitted on {result['fit_images']} images, chosen on "
            f"{result['choose_images']} others, {result['seconds']:.1f} s; saved in {out}"
        )


def table(result: dict[str, Any]) -> Table:
    """Before and after, by group of images."""
    from rich.markup import escape
    from rich.table import Table

    from ..tasks import Classification

    measure = Classification.metric
    shown = Table("images")
    for name in ("n", f"{measure.label}\nbefore", "after", "goes to the\nnewcomer, %"):
        shown.add_column(name, justify="right")
    for group in result["groups"]:
        values = (measure.number(group[name]) for name in ("before", "after"))
        what = f"{group['name']} ({group['split']})"
        shown.add_row(escape(what), str(group["images"]), *values, f"{100 * group['share']:.1f}")
    return shown
