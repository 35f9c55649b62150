"""Features of every image by every model of a hub, computed once: ``hubpath shelf extract``.

Images are decoded once for each size, and model after model looks at all of them, one in memory at
a time. A model's file is written aside and renamed, so that a process that is killed loses the
model it was at, and the next one computes what is missing. A model that fails is left out and told,
and tried again next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..data.cache import DECODED_AT_ONCE
from ..data.kept import FileList
from ..files import UNFINISHED, remove_leftovers
from ..hub.errors import HubError
from ..hub.source import HubModel
from ..hub.spec import ExpertSpec
from ..sizes import bytes_text
from ..training.interrupt import Interrupt
from .compute import Body, Computation, gathered, make_body
from .pixels import CONTENTS, PIXELS, Images, Squares, Views
from .plan import Plan, Planned, key_of, make_plan
from .shelf import DTYPES, FEATURES, IMAGES, RECORD, ROUTER, TARGETS, Shelf, ShelfModel, ShelfRecord
from .write import remove_features, write_images, write_model, write_pixels, write_record

ROUTER_PIXELS = 64  # pixels a side of what a router looks at: enough to tell images apart
ENOUGH_SECONDS = 10.0  # of a first batch, to tell the time of all by
SCRATCH = "scratch"  # in the folder of the decoded images
WRITTEN = (RECORD, IMAGES, TARGETS, ROUTER, CONTENTS)  # into the shelf's folder


class Progress(Protocol):
    """What is told of an extraction."""

    def say(self, text: str) -> None:
        """A line."""

    def begin(self, images: int) -> None:
        """How many views of images all bodies together will look at."""

    def advance(self, images: int, at: str) -> None:
        """That many more are done, or given up. at: the model at work."""


@dataclass
class Extracted:
    """What an extraction did.

    there, computed: labels of models. failed: (name, reason) of those that were left out. images:
    n. decodes: of images. looked: views of images that bodies looked at. bytes: of the features
    that were written. seconds: in all, body_seconds of them in bodies.
    """

    images: int
    there: tuple[str, ...] = ()
    computed: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    decodes: int = 0
    looked: int = 0
    bytes: int = 0
    seconds: float = 0.0
    body_seconds: float = 0.0


def extract(
    folder: Path,
    record: ShelfRecord,
    images: Images,
    files: FileList | None,
    wanted: Sequence[tuple[ExpertSpec, HubModel]],
    device: torch.device,
    batch_size: int | None,
    progress: Progress,
) -> Extracted:
    """Computes what a shelf lacks; nothing else may work in its folder.

    Args:
        folder: with a shelf, or without one.
        record: of the shelf that is there, or what a new one is to be of.
        images, files: its images, and their list where they are files.
        wanted: as ``wanted.read_names`` gives them.
        batch_size: of the bodies; None: what their memory allows.

    Raises:
        ValueError: too little room on the disk; images that have changed or are broken.
        InterruptedError: SIGINT or SIGTERM came; what is done is kept.
    """
    began = time.monotonic()
    with Interrupt() as interrupt:

        def stop() -> None:
            if interrupt.requested:
                raise InterruptedError(
                    f"stopped by {interrupt.requested}; the same command goes on with the model "
                    "that it was at"
                )

        work = _Extraction(folder, record, images, device, batch_size, progress, stop)
        done = work.run(files, wanted)
    done.seconds = time.monotonic() - began
    return done


class _Extraction:
    def __init__(
        self,
        folder: Path,
        record: ShelfRecord,
        images: Images,
        device: torch.device,
        batch_size: int | None,
        progress: Progress,
        stop: Callable[[], None],
    ):
        self.folder, self.record, self.images = folder, record, images
        self.device, self.batch_size, self.progress = device, batch_size, progress
        self.stop, self.done = stop, Extracted(len(images))
        self.succeeded: set[str] = set()  # names
        self.views = Views(record.views, len(images), record.seed, record.flip, record.min_area)
        self.squares = Squares(folder, images, stop)

    def run(
        self, files: FileList | None, wanted: Sequence[tuple[ExpertSpec, HubModel]]
    ) -> Extracted:
        new = not (self.folder / RECORD).exists()
        shelf = Shelf(self.folder, self.record, (), self.images.targets)
        if not new:
            shelf = Shelf.open(self.folder, models=False)
        self._tidy({model.key for model in shelf.models})
        with self._failures_written():
            plan = make_plan(shelf, wanted, self.stop)
            self.done.there = tuple(model.label for model in plan.there)
            self.succeeded.update(model.name for model in plan.there)
            for name, reason in plan.failed:
                self._fail(name, reason)
            if plan.sizes:
                self._compute(plan, files, new)
            self.squares.drop()
        return self.done

    def _tidy(self, keys: Collection[str]) -> None:
        """Deletes what a killed extraction has left: unfinished files, and those of models that
        others have taken the place of. keys: of the files that stay."""
        for name in WRITTEN:  # others write files of their own into this folder meanwhile
            remove_leftovers(self.folder, f".{name}.*{UNFINISHED}")
        remove_leftovers(self.folder / FEATURES)
        remove_features(self.folder, keys)

    def _compute(self, plan: Plan, files: FileList | None, new: bool) -> None:
        if new:
            smallest = min(plan.sizes)
            sizes = {"router_size": min(ROUTER_PIXELS, smallest), "router_crop": smallest}
            self.record = dataclasses.replace(self.record, **sizes)
        router = self.record.router_size is not None and not (self.folder / ROUTER).exists()
        self._check_room(plan, router)
        self._describe(plan)
        first = self._first(plan)
        if new:
            write_images(self.folder, files, self.images.targets)
            write_record(self.folder, self.record)
        self._all_sizes(plan, self.record.router_crop if router else None, first)

    def _all_sizes(
        self, plan: Plan, router: int | None, first: tuple[Planned, Body] | None
    ) -> None:
        """router: the size of the images that its pixels are made of; None: they are there."""
        groups: dict[int, list[Planned]] = {} if router is None else {router: []}
        for planned in plan.pending:
            groups.setdefault(planned.shapes.size, []).append(planned)
        for size, group in groups.items():
            todo = [planned for planned in group if planned.name not in self._failed_names]
            if not todo and size != router:
                continue
            squares = self.squares.open(size)
            if size == router:
                self._write_router(squares, size)
            for planned in todo:
                body = first[1] if first is not None and first[0] is planned else None
                first = None if body is not None else first
                self._one(planned, body, squares)
            del squares
            self.squares.drop()
        self.done.decodes = self.squares.decodes

    def _one(self, planned: Planned, body: Body | None, squares: Tensor) -> None:
        """Computes and writes a model's features, or says why not."""
        dtype, count = DTYPES[self.record.dtype], self.views.count * len(self.images)
        shape = self.views.count, len(self.images), planned.shapes.num_features
        before, work = self.done.looked, None
        try:
            body = body or make_body(planned, self.record, self.device)
            work = Computation(body, planned, self.device, self.batch_size)
            parts = work.parts(squares, self.views, dtype, self.images.name, self.stop)
            parts = self._watched(parts, planned)
            with gathered(self.folder / PIXELS / SCRATCH, parts, shape, dtype) as features:
                head = work.source_head(squares, self.views)
                key = key_of(
                    self.record, planned.name, planned.model, planned.shapes.size, body.known
                )
                self._write(planned, body, key, features, head, work)
        except HubError as error:
            self._fail(planned.name, str(error))
            self.progress.advance(count - (self.done.looked - before), planned.label)
        finally:
            self.done.body_seconds += 0.0 if work is None else work.seconds

    def _watched(self, parts: Iterator[Tensor], planned: Planned) -> Iterator[Tensor]:
        for part in parts:
            self.done.looked += len(part)
            self.progress.advance(len(part), planned.label)
            yield part

    def _write(
        self,
        planned: Planned,
        body: Body,
        key: str,
        features: Tensor,
        head: tuple[Tensor, Tensor] | None,
        work: Computation,
    ) -> None:
        shapes = planned.shapes
        model = ShelfModel(
            planned.name,
            planned.label,
            planned.position,
            key,
            shapes.num_features,
            weights=body.weights,
            size=shapes.size,
            parameters=shapes.parameters,
            flops=shapes.flops,
            ms=1000 * work.seconds / work.looked,
            source_classes=0 if head is None else len(head[1]),
        )
        write_model(self.folder, model, features, head)
        self.succeeded.add(planned.name)
        self._write_failures()  # one that failed before is not on the shelf until then
        if planned.replaces is not None and planned.replaces.key != key:
            self._remove(planned.replaces)
        self.done.computed.append(planned.label)
        self.done.bytes += features.numel() * features.element_size()

    def _write_router(self, squares: Tensor, size: int) -> None:
        small, views = self.record.router_size, self.views

        def parts() -> Iterator[Tensor]:
            for view in range(views.count):
                for start in range(0, len(squares), DECODED_AT_ONCE):
                    self.stop()
                    pixels = squares[start : start + DECODED_AT_ONCE]
                    yield views.cut_and_resize(pixels, start, view, size, small)

        shape = views.count, len(squares), 3, small, small
        path = self.folder / PIXELS / SCRATCH
        with gathered(path, parts(), shape, torch.uint8) as pixels:
            write_pixels(self.folder, pixels)

    def _first(self, plan: Plan) -> tuple[Planned, Body] | None:
        """The first model that can be built, by a batch of which the time of all is told."""
        for planned in plan.pending:
            self.stop()
            try:
                body = make_body(planned, self.record, self.device)
                work = Computation(body, planned, self.device, self.batch_size)
                size, count = planned.shapes.size, min(work.batch_size, len(self.images))
                images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
                before = work.seconds
                for _ in range(2):  # the first time is slower, and by far where a batch is short
                    if work.seconds < ENOUGH_SECONDS:
                        before = work.seconds
                        work.look(images)
            except HubError as error:
                self._fail(planned.name, str(error))
                continue
            left = [p for p in plan.pending if p.name not in self._failed_names]
            times = self.views.count * len(self.images) * sum(p.shapes.work for p in left)
            seconds = (work.seconds - before) / count / planned.shapes.work * times
            self.progress.say(
                f"about {duration(seconds)} for the models, going by one batch of {planned.label} "
                "and what the others compute; decoding, opening and cropping come on top"
            )
            self.progress.begin(self.views.count * len(self.images) * len(left))
            return planned, body
        return None

    def _check_room(self, plan: Plan, router: bool) -> None:
        needed = plan.disk_bytes(self.record, router)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"out: the features need {bytes_text(needed)} in {self.folder}, decoded images "
                f"meanwhile among them, but {bytes_text(free)} are free there; make room, or take "
                "fewer models or views"
            )
        if needed:
            kept = bytes_text(plan.features_bytes(self.record))
            self.progress.say(
                f"needs {bytes_text(needed)} of disk while it runs ({kept} for features that stay; "
                f"the rest is mostly images, decoded once), {bytes_text(free)} are free"
            )

    def _describe(self, plan: Plan) -> None:
        count, views = len(plan.there) + len(plan.pending), self.record.views
        each = f" x {views} views" if views > 1 else ""
        self.progress.say(
            f"models: {count}, of which {len(plan.there)} are on the shelf and "
            f"{len(plan.pending)} to compute, on {len(self.images)} images{each}"
        )
        for planned in plan.pending:
            if planned.replaces is not None:
                self.progress.say(
                    f"{planned.label}: its weights, or the library that builds it, are others than "
                    "when its features were computed; they are computed again"
                )

    def _remove(self, model: ShelfModel) -> None:
        (self.folder / FEATURES / f"{model.key}.safetensors").unlink(missing_ok=True)

    def _fail(self, name: str, reason: str) -> None:
        reason = reason.removeprefix(f"{name}: ")
        self.done.failed.append((name, reason))
        self.progress.say(f"left out: {name}: {reason}")

    @property
    def _failed_names(self) -> set[str]:
        return {name for name, _ in self.done.failed}

    @contextlib.contextmanager
    def _failures_written(self) -> Iterator[None]:
        """At the end, the record says which models failed: those of before, but for the ones that
        have succeeded since, and those of now."""
        try:
            yield
        finally:
            if (self.folder / RECORD).exists():
                self._write_failures()

    def _write_failures(self) -> None:
        known = {**dict(self.record.failed), **dict(self.done.failed)}
        failed = tuple(entry for entry in known.items() if entry[0] not in self.succeeded)
        if failed != self.record.failed:
            self.record = dataclasses.replace(self.record, failed=failed)
            write_record(self.folder, self.record)


def duration(seconds: float) -> str:
    """For people: "3 h 20 min", "12 min", "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
