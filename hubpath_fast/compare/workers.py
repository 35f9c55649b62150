"""Concurrent runs, each in a process of its own.

A process of its own for each run means that its memory can be measured, that one that dies takes no
other along, and that nothing of one run can leak into the next.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from ..data.images import usable_cores
from ..devices import check_device
from ..files import write_json
from ..hub.costs import BYTES_PER_ADAMW_PARAMETER
from ..training import Interrupt

MAX_WORKERS = 4
MEMORY_FRACTION = 0.8  # of what is available
# What a worker holds besides its hub: torch, the data, what a step keeps. Measured of tiny networks
# on digits.
WORKER_BYTES = 500 * 2**20
REFRESH_SECONDS = 0.5

# Imported once, by the server that forks itself for each run. timm and scikit-learn are otherwise
# imported where they are first needed, which would be in every process.
PRELOAD = (f"{__package__}.work", "timm", "sklearn.datasets", "torch._dynamo")


def choose_workers(asked: int | None, device: str) -> tuple[int, int]:
    """(concurrent runs, threads of each, which OMP_NUM_THREADS limits too).

    asked: None for as many as there are cores, at most MAX_WORKERS; on a GPU one.
    """
    cores = usable_cores()
    if asked is not None and asked < 1:
        raise ValueError(f"workers: expected an integer of at least 1, got {asked}")
    on_cpu = check_device(device).type == "cpu"
    count = asked or (min(cores, MAX_WORKERS) if on_cpu else 1)
    return count, max(1, min(cores // count, torch.get_num_threads()))


def workers_that_fit(
    count: int, parameters: int, available: int | None, more_bytes: int = 0
) -> int:
    """At most ``count`` workers, and at least one, for which there is memory.

    Args:
        count: wanted.
        parameters: of the hub, which each holds.
        available: bytes of memory; None: unknown, then ``count``.
        more_bytes: what each needs besides.
    """
    if available is None:
        return count
    each = WORKER_BYTES + BYTES_PER_ADAMW_PARAMETER * parameters + more_bytes
    return max(1, min(count, int(MEMORY_FRACTION * available) // each))


class AnyJob(Protocol):
    """What a process of its own is made for; it is pickled.

    key: what it is to others; several may share one. before: keys of the jobs that must be over
    before it starts, well or not. failed: where in the command's folder it says why it failed.
    """

    @property
    def key(self) -> Hashable: ...

    @property
    def before(self) -> Collection[Hashable]: ...

    def failed(self, out_dir: Path) -> Path: ...


J = TypeVar("J", bound=AnyJob)


class Workers(Generic[J]):
    """Runs jobs in up to ``count`` processes with ``threads`` threads each.

    body: what a process does with its job; it is pickled. preload: what it imports, by module.
    """

    def __init__(
        self,
        body: Callable[[J], None],
        out_dir: Path,
        count: int,
        threads: int,
        preload: Sequence[str] = PRELOAD,
    ):
        self.body, self.out_dir = body, out_dir
        self.count, self.threads = count, threads
        self._processes = start_server(threads, preload)
        self._running: dict[int, tuple[J, BaseProcess, float]] = {}

    def run(
        self,
        jobs: Sequence[J],
        is_done: Callable[[J], bool],
        ended: Callable[[J, float], None],
        refresh: Callable[[list[J]], None] = lambda running: None,
    ) -> None:
        """Does all jobs, in their order, each when those that it needs are over.

        Args:
            jobs: what to do.
            is_done: whether a job has left its result.
            ended: called for each job that ended, with its seconds.
            refresh: called about twice a second with the jobs that run.

        Raises:
            InterruptedError: a signal came; what was begun has then saved itself.
        """
        waiting = list(jobs)
        with Interrupt() as interrupt:
            try:
                while (waiting or self._running) and interrupt.requested is None:
                    for job in self._ready(waiting)[: self.count - len(self._running)]:
                        waiting.remove(job)
                        self._start(job)
                    wait(list(self._running), timeout=REFRESH_SECONDS)
                    for job, seconds, code in self._collect():
                        if not is_done(job):
                            self._note_death(job, code)
                        ended(job, seconds)
                    refresh([job for job, _, _ in self._running.values()])
            finally:
                self._stop()
        if interrupt.requested is not None:
            raise InterruptedError(
                f"stopped by {interrupt.requested}; the same command goes on from here"
            )

    def _ready(self, waiting: Sequence[J]) -> list[J]:
        unfinished = {job.key for job in waiting}
        unfinished |= {job.key for job, _, _ in self._running.values()}
        return [job for job in waiting if unfinished.isdisjoint(job.before)]

    def _start(self, job: J) -> None:
        process = self._processes.Process(target=self.body, args=(job,), name=str(job))
        with _environment(OMP_NUM_THREADS=str(self.threads)):  # of processes that are not forked
            process.start()
        self._running[process.sentinel] = (job, process, time.monotonic())

    def _collect(self) -> list[tuple[J, float, int]]:
        """The jobs that ended, with their seconds and how their processes ended."""
        ended = []
        for sentinel, (job, process, began) in list(self._running.items()):
            if not process.is_alive():
                process.join()
                del self._running[sentinel]
                ended.append((job, time.monotonic() - began, process.exitcode))
        return ended

    def _note_death(self, job: J, code: int) -> None:
        """A process that could not even write why it failed, such as one out of memory."""
        path = job.failed(self.out_dir)
        if not path.is_file():
            by = f" of {signal.Signals(-code).name}" if -code in set(signal.Signals) else ""
            write_json(path, {"error": f"its process died{by}; was there enough memory?"})

    def _stop(self) -> None:
        for _, process, _ in self._running.values():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
        for _, process, _ in self._running.values():
            process.join()
        self._running.clear()


def start_server(
    threads: int, preload: Sequence[str] = PRELOAD
) -> multiprocessing.context.BaseContext:
    """Where there can be, a server that has imported everything once and forks itself for each run:
    a process of one's own then starts at once, and not after the seconds that torch takes. It
    begins to import here, at the first call, while the caller goes on. preload: what it imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # A Ctrl-C is the command's, also while the server imports: it would end in midst of that.
    resource_tracker.ensure_running()  # here, since it unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _environment(OMP_NUM_THREADS=str(threads)):  # read once, when OpenMP is first used
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables of the environment for as long as it lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
