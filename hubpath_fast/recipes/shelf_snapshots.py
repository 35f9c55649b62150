"""The snapshots of the digits' shelf, made in processes of one thread, as many as there are cores.

Each training is a process of its own: one that is stopped loses itself alone, and the same call
goes on with those that are missing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..compare.process import process_of_a_job
from ..compare.progress import JobProgress
from ..compare.results import read
from ..compare.workers import Workers
from ..data.images import usable_cores
from ..shelf.digits import DigitsSnapshots, is_whole

PRELOAD = (__name__, "timm", "sklearn.datasets")
THREADS = 1  # of each process: a second one gains little on networks this small


@dataclass(frozen=True)
class Job:
    """A training, by its number in ``DigitsSnapshots.trainings``."""

    index: int
    name: str
    before: tuple[int, ...] = ()

    @property
    def key(self) -> int:
        return self.index

    def failed(self, out_dir: Path) -> Path:
        return out_dir / f"{self.name}.failed.json"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Body:
    """What a process does with its job."""

    snapshots: DigitsSnapshots
    out_dir: Path

    def __call__(self, job: Job) -> None:
        with process_of_a_job(job.failed(self.out_dir), THREADS):
            self.snapshots.train(self.snapshots.trainings[job.index])


class Progress(JobProgress):
    """A line a training."""

    def __init__(self, console: Console, total: int, body: Body):
        super().__init__(console, total)
        self.body = body

    def said(self, job: Job) -> str:
        failed = read(job.failed(self.body.out_dir))
        if failed is not None:
            return f"[red]failed:[/] {failed['error']}"
        return f"{len(self.body.snapshots.trainings[job.index].files)} snapshots"

    def share(self, job: Job) -> float:
        training = self.body.snapshots.trainings[job.index]
        taken = [
            step
            for step, file in zip(training.settings.taken, training.files, strict=True)
            if file.is_file()
        ]
        return max(taken, default=0) / training.settings.taken[-1]


def make_snapshots(
    snapshots: DigitsSnapshots, out_dir: Path, console: Console, workers: int | None = None
) -> float:
    """Trains those that are missing; returns the seconds it took.

    Args:
        snapshots: whose cache is filled.
        out_dir: where a process writes why it failed.
        console: gets a line a training.
        workers: processes at a time; None: as many as there are cores.

    Raises:
        OSError: one failed, with its reason.
        InterruptedError: a signal came; what is whole stays.
    """
    began = time.perf_counter()
    missing = [snapshots.trainings.index(training) for training in snapshots.missing()]
    if not missing:
        return 0.0
    body = Body(snapshots, out_dir)
    # The longest network first, so that no core waits for another at the end.
    jobs = [Job(i, snapshots.trainings[i].name) for i in reversed(missing)]
    pool = Workers(body, out_dir, workers or usable_cores(), THREADS, PRELOAD)
    with Progress(console, len(jobs), body) as progress:
        pool.run(
            jobs,
            lambda job: is_whole(snapshots.trainings[job.index]),
            progress.ended,
            progress.refresh,
        )
    for job in jobs:
        if (failed := read(job.failed(out_dir))) is not None:
            raise OSError(f"the training of {job} failed: {failed['error']}")
    return time.perf_counter() - began
