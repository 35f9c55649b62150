"""``hubpath shelf extract``: opens the data as ``fit`` does, and computes what a shelf lacks.

A shelf that is there says what it is of, and what is not asked for is taken from it: its images are
opened by its own list, so that data which has changed is found, and further models are added with
``--hub`` alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..data import ImageSplits, open_dataset
from ..data.kept import FileList, data_base, reopen
from ..data.named import DIGITS, FOLDER, find_dataset
from ..data.splits import ImageSplit
from ..data.transforms import check_min_area, check_size
from ..devices import check_device
from ..features.extract import Extracted, duration, extract
from ..features.pixels import Images
from ..features.shelf import DTYPES, RECORD, Shelf, ShelfRecord, digest_of, read_record
from ..features.wanted import read_names
from ..locks import locked
from ..notes import show_notes
from ..runs.places import check_apart, check_not_taken
from ..shelf.heads import remove_strays
from ..sizes import bytes_text
from ..written import SHELF

VALIDATION = 0.15
OTHER = "the features of a shelf are all alike: leave it out, or make a new shelf"


@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """What a shelf is to be of. None: what the shelf in the folder is of, or else the default.

    data: folder of images as ``fit`` takes it, or the one that the named set lies in. dataset: a
    set of ``hubpath data list``, by default a folder of one's own. views: V, 1 by default. dtype:
    "fp16" (the default) or "fp32". image_size: pixels a side of all models but those whose spec
    says one; by default each has its own. validation, seed: of what is held out, 0.15 and 0; the
    seed draws the random views and random weights, too. flip, min_area: of the random views.
    pretrained: the weights that the models' names stand for (the default), or random ones.
    """

    data: str | None = None
    dataset: str | None = None
    views: int | None = None
    dtype: str | None = None
    image_size: int | None = None
    validation: float | None = None
    seed: int | None = None
    flip: bool | None = None
    min_area: float | None = None
    pretrained: bool | None = None

    def check(self) -> None:
        """Raises ValueError."""
        if self.views is not None and self.views < 1:
            raise ValueError(f"views: expected an integer of at least 1, got {self.views}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.image_size is not None:
            check_size(self.image_size)
        if self.min_area is not None:
            check_min_area(self.min_area)


def extract_shelf(
    out: str | Path,
    hub: str | Sequence[str],
    settings: ExtractSettings = ExtractSettings(),
    batch_size: int | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> Extracted:
    """Makes a shelf, or adds models to one.

    Args:
        out: its folder. hub: names of models, see ``features.wanted``.
        batch_size: of the bodies; None: what their memory allows.
        console: where progress is shown; None: nowhere.

    Raises:
        ValueError: settings or images that are not those of the shelf, names that are wrong, too
            little room on the disk; another extraction is at work in the folder.
        InterruptedError: stopped by a signal; what is done is kept.
    """
    out, console = Path(out), console or Console(quiet=True)
    settings.check()
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size}")
    wanted = read_names(hub, _pretrained(out, settings))
    where = check_device(device)
    check_apart(out, find_dataset(settings.dataset or FOLDER), settings.data)
    check_not_taken(out, SHELF)
    with locked(out, "extraction", console, alone=False):  # a ranking may write into it
        there = (out / RECORD).exists()
        splits, record, files = (_known if there else _new)(out, settings)
        show_notes((*splits.notes, *splits.changes), console)
        images, line = Images(splits), _Line(console)
        try:
            done = extract(out, record, images, files, wanted, where, batch_size, line)
        finally:
            line.close()
        if (out / RECORD).exists():
            remove_strays(Shelf.open(out, models=False))
        return done


def summary(done: Extracted) -> list[str]:
    """What was done, for people."""
    parts = [f"models: {len(done.computed)} computed", f"{len(done.there)} there before"]
    if done.failed:
        parts.append(f"{len(done.failed)} left out, as said above")
    lines = [", ".join(parts)]
    if done.looked:
        share = done.body_seconds / done.seconds
        lines.append(
            f"{done.looked / done.seconds:.0f} forwards/s (an image through a model): "
            f"{done.decodes} decodes for {done.looked} forwards, {bytes_text(done.bytes)} of "
            f"features in {duration(done.seconds)}, {share:.0%} of it in the models"
        )
    return lines


def _pretrained(out: Path, asked: ExtractSettings) -> bool:
    """Raises ValueError: a shelf that is damaged."""
    if asked.pretrained is not None:
        return asked.pretrained
    return read_record(out).pretrained if (out / RECORD).exists() else True


def _new(out: Path, asked: ExtractSettings) -> tuple[ImageSplits, ShelfRecord, FileList | None]:
    """The data of a new shelf. Raises ValueError."""
    dataset = find_dataset(asked.dataset or FOLDER)
    if asked.data is None and dataset != DIGITS:
        raise ValueError("data: nothing given; use --data FOLDER, or --dataset NAME --data FOLDER")
    data = "" if asked.data is None else os.path.abspath(asked.data)
    validation = VALIDATION if asked.validation is None else asked.validation
    seed = asked.seed or 0
    splits = open_dataset(dataset, data or None, validation, seed)
    files = _files(splits, dataset, data)
    images = Images(splits)
    given = {name: getattr(asked, name) for name in ("views", "flip", "min_area", "pretrained")}
    return (
        splits,
        ShelfRecord(
            classes=tuple(splits.classes),
            sizes=images.sizes,
            dtype=asked.dtype or "fp16",
            digest=digest_of(files, images.targets, images.sizes, splits.classes),
            seed=seed,
            image_size=asked.image_size,
            data=data,
            dataset=dataset,
            validation=validation,
            test_is_validation=splits.test_is_validation,
            **{name: value for name, value in given.items() if value is not None},
        ),
        files,
    )


def _known(out: Path, asked: ExtractSettings) -> tuple[ImageSplits, ShelfRecord, FileList | None]:
    """The data of the shelf that is there. Raises ValueError: it has other settings, or changed."""
    record = read_record(out)
    if not record.dataset:
        raise ValueError(
            f"out: {out} is a shelf of features of your own, to which no image is known; "
            "write_shelf makes another with more of them"
        )
    dataset = None if asked.dataset is None else find_dataset(asked.dataset)
    given: dict[str, Any] = {**vars(asked), "dataset": dataset, "data": None}
    for name, value in given.items():
        if value is not None and value != getattr(record, name):
            raise ValueError(f"{name}: {out} has {getattr(record, name)}, got {value}; {OTHER}")
    draw = record.validation, record.seed
    data = record.data if asked.data is None else os.path.abspath(asked.data)
    files = Shelf.open(out, models=False).images()
    if files is None:
        splits = open_dataset(record.dataset, data or None, *draw)
    else:
        splits = reopen(files, record.dataset, data, *draw, what="shelf")
    images = Images(splits)
    if digest_of(files, images.targets, images.sizes, splits.classes) != record.digest:
        raise ValueError(f"data: its images are not those of the shelf in {out}; make a new shelf")
    return splits, record, files


def _files(splits: ImageSplits, dataset: str, data: str) -> FileList | None:
    parts = {name: part for name, part in splits.distinct.items() if len(part)}
    if not all(isinstance(part, ImageSplit) for part in parts.values()):
        return None
    return FileList.of(parts, splits.classes, data_base(dataset, data))


class _Line:
    """Progress on a terminal as one line that renews itself; elsewhere a plain line for each
    further twentieth."""

    REFRESH_SECONDS, PLAIN_LINES = 0.2, 20

    def __init__(self, console: Console):
        self.console, self._bar = console, None
        self._total, self._done, self._first, self._began, self._shown = 0, 0, 0, 0.0, 0.0

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, images: int) -> None:
        self._total = images
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                BarColumn(bar_width=10), TextColumn("{task.percentage:>3.0f}% ETA"),
                TimeRemainingColumn(compact=True), TextColumn("{task.fields[text]}"),
            )  # fmt: skip
            # No refresh thread: it would contend with the bodies for the interpreter.
            self._bar = Progress(*columns, console=self.console, auto_refresh=False)
            self._bar.add_task("", total=images, text="")
            self._bar.start()

    def advance(self, images: int, at: str) -> None:
        now = time.monotonic()
        if not self._done:  # the rate is told without the decoding that came before
            self._first, self._began = images, now
        before, self._done = self._done, self._done + images
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        text = f"{rate:.0f} forwards/s | {at}" if rate else at
        if self._bar is not None:
            if now - self._shown > self.REFRESH_SECONDS:
                self._shown = now
                [task] = self._bar.task_ids
                self._bar.update(task, completed=self._done, text=text, refresh=True)
        elif self._part(self._done) > self._part(before):
            eta = f" ETA {duration((self._total - self._done) / rate)}" if rate else ""
            self.say(f"{self._done / self._total:.0%}{eta} | {text}")

    def _part(self, done: int) -> int:
        return self.PLAIN_LINES * done // max(1, self._total)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
