"""``hubpath export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..notes import show_notes
from .messages import console, messages

if TYPE_CHECKING:
    from ..serving import Package


def export(
    run: Annotated[
        Path, typer.Argument(help="folder of a run of `hubpath fit`, or of a saved model")
    ],
    format: Annotated[
        str,
        typer.Option(
            help="pt2 (torch.export), aoti (compiled; minutes, and a C++ compiler), onnx (needs "
            "the extra [onnx]) or parts (a folder: router and experts by themselves)"
        ),
    ] = "pt2",
    form: Annotated[
        Optional[str],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Option(help="sparse, cond, dense or parts; default: the first that can be exported"),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="file (.pt2, .onnx) or folder to write; default: in the run's folder"),
    ] = None,
    device: Annotated[str, typer.Option(help="that the package is for: cpu, cuda, ...")] = "cpu",
    routing: Annotated[
        bool, typer.Option("--routing", help="also return which experts spoke, with what weight")
    ] = False,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="the one batch size that it takes; default: any", min=1),
    ] = None,
    opset: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="of ONNX; default: the one that torch writes", min=1),
    ] = None,
) -> None:
    """Write a run's model as a package that runs without hubpath_fast, and prove it.

    The package takes uint8 images [N, 3, S, S] and answers with probabilities [N, C]. It is opened
    in a fresh process and compared with the model on images that want every expert; where they
    differ, nothing is written.
    """
    with messages():
        from ..recipes.export import export as recipe

        package, notes = recipe(run, out, format, form, device, routing, batch, opset)
        for line in lines(package):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        show_notes(notes, console)


def lines(package: Package) -> list[str]:
    """What to say of a package."""
    about = package.about
    costs = [f"{count} for a batch of {n}" for n, count in about["forwards"].items()]
    proof = about["proof"]
    batches = ", ".join(map(str, proof["batches"]))
    said = [
        *(f"not {tried['form']}: {tried['reason']}" for tried in about["tried"]),
        f"{package.path}: {about['format']}, {package.form}; forwards of experts: "
        f"{', '.join(costs)}",
        f"largest difference from the model {proof['largest_difference']:.2g}, on "
        f"{proof['images']} images in batches of {batches}",
    ]
    if proof["reached_by_score"]:
        names = ", ".join(proof["reached_by_score"])
        said.append(f"no image asks {names}: compared with their scores raised, here and there")
    return said
