"""``hubpath compare``: does what is missing, and writes the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import report
from .methods import Method, choose_methods
from .plan import PREPARE, Job, plan_jobs
from .results import FAILED, PROBLEM, RESULT, SeedResults, read, seed_folder
from .settings import CompareSettings, names_of_experts, open_folder
from .tables import make_rows, reasons, write_tables

LOCK = ".lock"
MOST_WORKERS = 4  # each holds a whole hub in memory


def compare(
    settings: CompareSettings,
    methods: str,
    seeds: Sequence[int],
    out_dir: str | Path,
    workers: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Trains what is missing of a comparison, and writes ``table.json``, ``.md`` and ``.html``.

    methods: names apart by commas, or "all"; see ``choose_methods``. workers: runs side by side,
    each with its share of the cores; None: as many as there are cores, at most 4 (on a GPU one).

    Returns the rows of ``table.json``; see ``make_rows``.

    Raises:
        ValueError: unknown methods, data or hub that cannot be used, a folder of another
            comparison or one in use. InterruptedError: a signal came.
    """
    console, out_dir = console or Console(), Path(out_dir)
    fit = settings.fit
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different whole numbers, got {list(seeds)}")
    chosen = choose_methods(methods, names_of_experts(settings), fit.k)
    count, threads = _workers(workers, fit.trainer.device)
    open_folder(out_dir, settings)
    try:
        with FileLock(out_dir / LOCK, timeout=0):
            crew = Crew(settings, out_dir, count, threads)
            _prepare(crew, seeds, console)
            jobs = _jobs(settings, chosen, seeds, out_dir)
            missing = [job for job in jobs if not _is_done(job, out_dir)]
            _announce(console, len(jobs), len(missing), count, threads)
            tell = _Progress(console, len(missing), out_dir)
            crew.do(missing, lambda job: _is_done(job, out_dir), tell)
            rows = make_rows(settings, chosen, seeds, out_dir)
            table = write_tables(out_dir, settings, rows, seeds)
    except Timeout:
        raise ValueError(f"out: another comparison is at work in {out_dir}; wait for it") from None
    console.print(_terminal_table(table))
    for note in reasons(rows):
        console.print(escape(note), soft_wrap=True, highlight=False)
    console.print(
        f"The table is in {out_dir / 'table.html'} (.md, .json); `hubpath report {out_dir}` shows "
        "whom each image was sent to.",
        soft_wrap=True,
    )
    return rows


def _workers(asked: int | None, device: str) -> tuple[int, int]:
    """(runs side by side, threads of each, which OMP_NUM_THREADS limits too)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if asked is not None and asked < 1:
        raise ValueError(f"workers: expected at least 1, got {asked}")
    on_cpu = torch.device(device).type == "cpu"
    count = asked or (min(cores, MOST_WORKERS) if on_cpu else 1)
    return count, max(1, min(cores // count, torch.get_num_threads()))


class Crew(NamedTuple):
    """Who does runs, and where."""

    settings: CompareSettings
    out_dir: Path
    count: int
    threads: int

    def do(self, jobs: Sequence[Job], is_done: Callable, tell: Callable) -> None:
        if jobs:
            from .work import Workers  # all that trains: slow to import for a finished comparison

            Workers(*self).run(jobs, is_done, tell)


def _prepare(crew: Crew, seeds: Sequence[int], console: Console) -> None:
    """Gets every seed's experts ready; what is wrong with data or hub is said here, before
    anything is fine-tuned."""

    def tell(job: Job, _seconds: float) -> None:
        if not _is_prepared(crew.out_dir, job.seed):
            raise ValueError(read(job.folder(crew.out_dir) / FAILED)["error"])

    missing = [Job(seed, PREPARE) for seed in seeds if not _is_prepared(crew.out_dir, seed)]
    if missing:
        numbers = ", ".join(str(job.seed) for job in missing)
        console.print(f"Getting the experts ready for seed {numbers}.", highlight=False)
    crew.do(missing, lambda job: _is_prepared(crew.out_dir, job.seed), tell)


def _jobs(
    settings: CompareSettings, methods: Sequence[Method], seeds: Sequence[int], out_dir: Path
) -> list[Job]:
    experts, k = len(settings.fit.hub), settings.fit.k
    difference = SeedResults(out_dir, seeds[0], settings.rates).problem["difference"]
    able = [method for method in methods if not (method.equal and difference)]
    runs = [run for method in able for run in method.runs(experts, k)]
    return [job for seed in seeds for job in plan_jobs(runs, seed, settings.rates, experts, k)]


def _is_prepared(out_dir: Path, seed: int) -> bool:
    return read(seed_folder(out_dir, seed) / PROBLEM) is not None


def _is_done(job: Job, out_dir: Path) -> bool:
    return read(job.folder(out_dir) / RESULT) is not None


class _Progress:
    """A line for every run that ends."""

    def __init__(self, console: Console, total: int, out_dir: Path):
        self.console, self.total, self.out_dir = console, total, out_dir
        self.done = 0

    def __call__(self, job: Job, seconds: float) -> None:
        self.done += 1
        folder = job.folder(self.out_dir)
        result = read(folder / RESULT)
        if result is not None:
            said = f"validation accuracy {result['validation']['accuracy']:.3f}"
        else:
            said = f"[red]failed:[/] {escape(read(folder / FAILED)['error'])}"
        self.console.print(
            f"\\[{self.done}/{self.total}] {job}: {said}, {seconds:.0f} s",
            soft_wrap=True,
            highlight=False,
        )


def _announce(console: Console, total: int, missing: int, count: int, threads: int) -> None:
    text = f"{total} runs, {total - missing} of them finished"
    if missing:
        text += f"; {missing} to do, {count} side by side with {threads} thread(s) each"
    console.print(text + ".", soft_wrap=True, highlight=False)


def _terminal_table(table: report.Table) -> Table:
    """Accuracy, forwards and training time: what fits a terminal."""
    shown = [0, 1, 2, 3, 6]
    found = Table()
    for j in shown:
        found.add_column(table.columns[j], justify="right" if j else "left")
    for i in range(len(table.rows)):
        style = "bold" if (i, 0) in table.highlight else None
        found.add_row(*(escape(table.text(i, j)) for j in shown), style=style)
    return found
