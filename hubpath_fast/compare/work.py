"""One run in a process of its own, and many side by side.

A process of its own for each run means that its memory can be measured, that one that dies takes no
other along, and that nothing of one run can leak into the next.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save

from ..baselines import difference
from ..files import write_bytes, write_json
from ..hub import HubError
from ..model import HubPathway
from ..runs.build import expert_names
from ..runs.measure import PeakMemory, dense_weights, inference_costs, probabilities, quality
from ..training import Interrupt, NonFiniteLoss, RoutingCollapseWarning
from .plan import PREPARE, Job, training_forwards
from .problems import open_problem
from .results import (
    FAILED,
    OUTPUTS,
    PROBLEM,
    RESULT,
    TARGETS,
    SeedResults,
    seed_folder,
)
from .runs import Context, train_run
from .settings import CompareSettings

INTERRUPTED = 130


def prepare(settings: CompareSettings, seed: int, out_dir: Path) -> None:
    """Makes a seed's experts ready (pre-trains those of the digits) and notes what all methods
    share: the names of classes and experts, held-out targets, why the hub is not homogeneous."""
    problem = open_problem(settings, seed, verify=True)
    experts = problem.experts()
    targets = dict(problem.targets)
    if problem.groups is not None:
        targets["groups"] = problem.groups
    folder = seed_folder(out_dir, seed)
    write_bytes(folder / TARGETS, save(targets))
    models = [expert.name.rpartition("/")[2] for expert in experts]
    write_json(
        folder / PROBLEM,
        {
            "classes": list(problem.classes),
            "experts": problem.expert_names,
            "models": expert_names(tuple(models)),
            "group_names": list(problem.group_names),
            "group_label": problem.group_label,
            "images": {name: len(part) for name, part in problem.targets.items()},
            "difference": difference([expert.body for expert in experts]),
            "fingerprint": problem.fingerprint(),
        },
    )


def run_job(settings: CompareSettings, job: Job, out_dir: Path) -> None:
    """Trains and measures one run, and writes its outputs and then its result."""
    device = settings.fit.trainer.device
    folder = job.folder(out_dir)
    (folder / FAILED).unlink(missing_ok=True)
    results = SeedResults(out_dir, job.seed, settings.rates)
    rate = results.result(job.follows)["rate"] if job.follows else job.rate
    problem = open_problem(settings, job.seed)
    noted = results.problem
    if problem.fingerprint() != noted["fingerprint"]:
        raise ValueError(
            f"the data is not what it was when this comparison began ({folder.parent / PROBLEM}): "
            "its held-out images or classes differ; compare anew in another folder"
        )
    problem.experts()  # what only loading needs is no part of the run's memory
    memory = PeakMemory(device)
    context = Context(problem, settings, job, folder, rate, results, Console(quiet=True))
    model = train_run(context)
    peak = memory.mebibytes()

    amp = settings.fit.trainer.amp
    scores = {
        split: probabilities(model, problem.batches(split), device, amp)
        for split in ("validation", "test")
    }
    measured = {name: quality(part, problem.targets[name]) for name, part in scores.items()}
    if isinstance(model, HubPathway):
        scores["weights"] = dense_weights(model, problem.batches("test"), device)
    images, _ = next(iter(problem.batches("test")))
    write_bytes(folder / OUTPUTS, save(scores))
    num_experts, k = len(problem.expert_names), settings.fit.k
    write_json(
        folder / RESULT,
        {
            "seed": job.seed,
            "run": job.run,
            "rate": rate,
            **measured,
            "train_seconds": context.seconds,
            "train_forwards_per_sample": training_forwards(job.run, num_experts, k),
            **inference_costs(model, images),
            "peak_memory_mb": peak,
            "threads": torch.get_num_threads(),
        },
    )


def work(settings: CompareSettings, job: Job, out_dir: Path, threads: int) -> None:
    """The body of a process: a job, whose failure is written down. Ends by itself when the process
    that started it is gone, so that nobody writes into a folder that another command took over."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in a terminal goes to the command, which hands it on once
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", RoutingCollapseWarning)  # the run's log has it
    try:
        if job.run == PREPARE:
            prepare(settings, job.seed, out_dir)
        else:
            run_job(settings, job, out_dir)
    except InterruptedError:
        os._exit(INTERRUPTED)
    except Exception as error:
        expected = isinstance(error, (ValueError, HubError, NonFiniteLoss, OSError))
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        record = {"error": text.strip(), "traceback": traceback.format_exc()}
        write_json(job.folder(out_dir) / FAILED, record)
        os._exit(1)


class Workers:
    """Runs jobs in up to ``count`` processes with ``threads`` threads each."""

    def __init__(self, settings: CompareSettings, out_dir: Path, count: int, threads: int):
        self.settings, self.out_dir = settings, out_dir
        self.count, self.threads = count, threads
        self._processes = _process_context()
        self._running: dict[int, tuple[Job, BaseProcess, float]] = {}

    def run(
        self,
        jobs: Sequence[Job],
        is_done: Callable[[Job], bool],
        tell: Callable[[Job, float], None],
    ) -> None:
        """Does all jobs, each when those of its seed that it needs are over, and tells of each
        that ended with its seconds. Raises InterruptedError when a signal came; what was begun
        has then saved itself."""
        waiting = list(jobs)
        with Interrupt() as interrupt:
            try:
                while (waiting or self._running) and interrupt.requested is None:
                    for job in self._ready(waiting)[: self.count - len(self._running)]:
                        waiting.remove(job)
                        self._start(job)
                    wait(list(self._running), timeout=0.5)
                    for job, seconds in self._collect():
                        if not is_done(job):
                            self._note_death(job)
                        tell(job, seconds)
            finally:
                self._stop()
        if interrupt.requested is not None:
            raise InterruptedError(
                f"stopped by {interrupt.requested}; the same command goes on from here"
            )

    def _ready(self, waiting: Sequence[Job]) -> list[Job]:
        unfinished = {(job.seed, job.run) for job in waiting}
        unfinished |= {(job.seed, job.run) for job, _, _ in self._running.values()}
        return [
            job
            for job in waiting
            if not any((job.seed, name) in unfinished for name in (*job.needs, PREPARE))
            or job.run == PREPARE
        ]

    def _start(self, job: Job) -> None:
        process = self._processes.Process(
            target=work, args=(self.settings, job, self.out_dir, self.threads), name=str(job)
        )
        # Read once, when OpenMP and oneDNN are first used in the new process.
        with _environment(OMP_NUM_THREADS=str(self.threads)):
            process.start()
        self._running[process.sentinel] = (job, process, time.monotonic())

    def _collect(self) -> list[tuple[Job, float]]:
        ended = []
        for sentinel, (job, process, began) in list(self._running.items()):
            if not process.is_alive():
                process.join()
                del self._running[sentinel]
                ended.append((job, time.monotonic() - began))
        return ended

    def _note_death(self, job: Job) -> None:
        """A process that could not even write why it failed, such as one out of memory."""
        path = job.folder(self.out_dir) / FAILED
        if not path.is_file():
            write_json(path, {"error": "its process died; was there enough memory?"})

    def _stop(self) -> None:
        for _, process, _ in self._running.values():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
        for _, process, _ in self._running.values():
            process.join()
        self._running.clear()


def _process_context() -> multiprocessing.context.BaseContext:
    """Where there can be, a server that has imported everything once and forks itself for each run:
    a process of one's own then starts at once, and not after the seconds that torch takes."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _environment:
    """Sets variables of the environment for as long as it lasts."""

    def __init__(self, **values: str):
        self.values = values

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
