"""``hubpath predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..notes import show_notes
from .fit import BudgetMs, Device, ExpertMajor, Folder, Room, TopMass
from .messages import console, errors, messages

if TYPE_CHECKING:
    from ..data.given import Given
    from ..recipes.answers import AnswerFile
    from ..recipes.predict import Prediction


Images = Annotated[
    list[str],
    typer.Argument(help='files, folders, patterns ("photos/**/*.jpg"), or - for a list on stdin'),
]
AnswersOut = Annotated[
    Optional[Path],  # noqa: UP045  (Typer reads it on Python 3.10 too)
    typer.Option(help="write the answers to a .csv or .jsonl file, a row an image"),
]
Classes = Annotated[
    bool, typer.Option("--classes", help="in --out: the probability of every class, too")
]
Decoders = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="threads that decode; 0: none beside this one", min=0),
]


def predict(
    run: Folder,
    images: Images,
    out: AnswersOut = None,
    classes: Classes = False,
    device: Device = "cpu",
    workers: Decoders = None,
    budget_ms: BudgetMs = None,
    top_mass: TopMass = None,
    room: Room = None,
    expert_major: ExpertMajor = False,
) -> None:
    """Class and probability of each image, and which experts spoke with what weight.

    An image that cannot be read is named on stderr, and the others are answered; then the status is
    1, or 2 if no image could be read. The rows of --out are in the order of the images, written
    batch by batch: a stop (status 130) keeps them. With --expert-major answers come together, of as
    many images as 1 GiB holds.
    """
    with messages():
        from ..data.images import default_workers
        from ..recipes.answers import check_ending
        from ..recipes.budget import follow
        from ..recipes.predict import predict_each
        from ..runs.config import CLASSIFICATION
        from ..runs.folder import open_run

        if classes and out is None:
            raise ValueError("classes: they are written to a file; give --out FILE, too")
        if out is not None:
            check_ending(out)
        opened = open_run(run, device, CLASSIFICATION, room)
        follow(run, opened.model, budget_ms, top_mass)
        show_notes(opened.notes, errors)
        found = find(images)
        workers = default_workers() if workers is None else workers
        predictions = predict_each(opened, found, workers, expert_major)
        if out is None:
            done, broken = answer(predictions, len(found))
        else:
            columns = opened.names, opened.classes if classes else ()
            done, broken = answer_in(out, columns, predictions, len(found))
        show_notes(opened.room_notes(), errors)
        end(broken, done, "could not be read")


def find(images: list[str]) -> list[Given]:
    """What is meant; ValueError if there is nothing to read among it."""
    from ..data.given import STDIN, find_images

    if STDIN in images and sys.stdin.isatty():
        say("reading paths, a line each; Ctrl-D ends the list (Ctrl-Z on Windows)")
    found, notes = find_images(images, sys.stdin.buffer if STDIN in images else None)
    show_notes(map(one_line, notes), errors)
    problems = [f"{item.path}: {item.problem}" for item in found if item.problem]
    if len(problems) == len(found):
        from ..data.layouts import examples

        raise ValueError(one_line(f"images: nothing to read; {examples(problems)}"))
    return found


def answer_in(
    out: Path,
    columns: tuple[Sequence[str], Sequence[str]],
    predictions: Iterator[Prediction],
    total: int,
) -> tuple[int, int]:
    """``answer`` in a file, and a line that says so. columns: names of experts, and of classes."""
    from ..recipes.answers import AnswerFile

    with AnswerFile(out, *columns) as file:
        done, broken = answer(predictions, total, file)
    said = f"{done - broken} of {done} images answered in {out}"
    console.print(escape(one_line(said)), soft_wrap=True, highlight=False)
    return done, broken


def answer(
    predictions: Iterator[Prediction], total: int, file: AnswerFile | None = None
) -> tuple[int, int]:
    """Writes or prints all, a batch at a time; (how many there were, how many are broken)."""
    from ..recipes.predict import BATCH

    done = broken = 0
    with _bar(alone=file is not None) as bar:
        task = bar.add_task("", total=total)
        try:
            while batch := list(islice(predictions, BATCH)):
                if file is not None:
                    file.write(batch)
                _tell(batch, quiet=file is not None)
                done += len(batch)
                broken += sum(p.error is not None for p in batch)
                bar.update(task, completed=done, refresh=True)
        except KeyboardInterrupt:
            kept = f"; {file.path} holds their rows" if file is not None else ""
            raise InterruptedError(f"stopped after {done} of {total} images{kept}") from None
    return done, broken


def end(broken: int, total: int, what: str) -> None:
    """Ends with status 1 where some images have no answer, with 2 where all have none."""
    if broken:
        say(f"[bold red]{broken} of {total} images {what}[/]")
        raise typer.Exit(2 if broken == total else 1)


def one_line(text: str) -> str:
    """Text on one line: what no console can show as its escape, such as a line break in a name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _tell(batch: Iterable[Prediction], quiet: bool) -> None:
    """A line an answer, on stdout; of a broken image one on stderr. quiet: no answers."""
    for p in batch:
        if p.error is not None:
            sys.stdout.flush()  # in the order given, where both go to one place
            say(f"[bold red]error:[/] {escape(one_line(p.error))}")
        elif not quiet:
            experts = ", ".join(f"{name} {weight:.2f}" for name, weight in p.experts.items())
            line = f"{p.given}: {p.label} ({p.probability:.3f}); experts: {experts}"
            print(one_line(line))
    sys.stdout.flush()


def say(text: str) -> None:
    errors.print(text, soft_wrap=True, highlight=False)


def _bar(alone: bool) -> Progress:
    """On stderr if it is a terminal, and unless the answers themselves pass by there."""
    shown = errors.is_terminal and (alone or not sys.stdout.isatty())
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("images, ETA"),
               TimeRemainingColumn(compact=True))  # fmt: skip
    return Progress(
        *columns, console=errors, disable=not shown, transient=True, auto_refresh=False,
        redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
