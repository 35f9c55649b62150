"""The tables of ``hubpath data``: which data sets there are, and whether one is whole."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data import CheckReport, check_dataset
from ..data.named import DIGITS, FACES, FOLDER, SPELLINGS, plain_name
from ..data.sources import PUBLISHED
from ..tasks.landmarks.check import check_faces
from ..tasks.landmarks.layouts import FACES as FACE_COUNTS
from ..tasks.landmarks.layouts import LAYOUTS
from ..tasks.landmarks.sets import FACE_SETS


def dataset_table() -> Table:
    """All data sets with their published counts."""
    table = Table("name", "data set", "classes", "train", "validation", "test")
    for entry in PUBLISHED.values():
        counts = [f"{entry.counts[split]:,}" if split in entry.counts else "held out"
                  for split in ("train", "validation", "test")]  # fmt: skip
        table.add_row(entry.name, entry.title, f"{entry.classes}", *counts)
    table.add_row(DIGITS, "handwritten digits", "10", "240", "60", "797")
    table.add_row(FOLDER, "your own images", "", "", "", "")
    for name, counts in FACE_COUNTS.items():
        points = f"{LAYOUTS[name].num_points} landmarks"
        sizes = f"{counts['train']:,}", "held out", f"{counts['full']:,}"
        table.add_row(name, f"{FACE_SETS[name].title} (faces)", points, *sizes)
    return table


def origins() -> dict[str, str]:
    """Where each data set comes from, by name."""
    own = "train/CLASS/IMAGE, CLASS/IMAGE, or lists train.txt, val.txt, test.txt of: path class"
    published = {entry.name: entry.origin for entry in PUBLISHED.values()}
    faces = {name: entry.origin for name, entry in FACE_SETS.items()}
    return {**published, DIGITS: "scikit-learn carries them", FOLDER: own, **faces}


def check(
    name: str | None, root: Path | None, decode: bool = False, out: Path | None = None
) -> CheckReport:
    """``data check`` of images with classes, or of faces with landmarks.

    Faces are the sets of that name, a CSV, and a folder with train.csv; ``root`` is then the folder
    of a set, or of a list's photographs. out: the drawing of a face; None: beside the user.
    """
    known = SPELLINGS.get(plain_name(name)) if name is not None else None
    if known in FACES:
        if root is None:
            raise ValueError(f"dataset {known!r} lies in a folder; give it (--root DIR)")
        return check_faces(known, root, None, decode, out or _drawing(known))
    if name is not None and _is_list(Path(name)):
        return check_faces(None, name, root, decode, out or _drawing(Path(name).stem))
    if out is not None:
        raise ValueError(
            f"out: a face is drawn where faces are checked, and {name or root} is none"
        )
    return check_dataset(name, root, decode)


def _is_list(path: Path) -> bool:
    """A CSV, or a folder with lists of faces."""
    return path.suffix.lower() == ".csv" or (path / "train.csv").is_file()


def _drawing(name: str) -> Path:
    return Path(f"hubpath-check-{name}.png")


def print_report(report: CheckReport, console: Console) -> None:
    """The counts, and a line for everything that was found."""
    known = any(published is not None for _, _, published in report.counts)
    own = not known and report.title != DIGITS
    table = Table("", "found", *(["published"] if known else []), title=report.title)
    for what, found, published in report.counts:
        right = published is None or found == published
        row = [what, f"{found:,}", *([f"{published:,}"] if published is not None else [])]
        table.add_row(*row, style=None if right else "bold red")
    console.print(table)
    lines = [
        *(("[bold red]refused[/]", text) for text in report.refused),
        *(("[bold red]look[/]" if own else "[bold red]wrong[/]", text) for text in report.problems),
        *(("[yellow]note[/]", text) for text in report.notes),
    ]
    for word, text in lines:
        console.print(f"{word} {escape(text)}", soft_wrap=True, highlight=False)
    console.print(_verdict(report, own), highlight=False, soft_wrap=True)


def _verdict(report: CheckReport, own: bool) -> str:
    if report.complete:
        return "[bold green]complete[/]"
    if report.sound:
        return "[bold green]nothing is wrong[/]; what was left out is none of your images"
    if report.refused:
        count = len(report.refused)
        reasons = "1 reason" if count == 1 else f"{count} reasons"
        return f"`{report.command}` refuses these {report.things}, for {reasons}"
    if own:
        return f"`{report.command}` trains on these {report.things}, and mentions what to look at"
    return "not as it was published"
