"""``hubpath atari compare``: every method on the same games, sources and steps, and the table."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..compare.process import process_of_a_job
from ..compare.progress import JobProgress
from ..compare.workers import Workers, choose_workers, workers_that_fit
from ..data.cache import free_memory
from ..fields import differences
from ..locks import locked
from ..runs.resolve import parse_set
from ..tasks.atari.comparison import (
    FROM_SCRATCH,
    PAPER_K,
    Asked,
    ComparisonSettings,
    Method,
    choose_methods,
    failed_of,
    log_of,
    methods_of,
    open_comparison,
    other_settings,
    read_failure,
    read_outcome,
    run_place,
    source_place,
)
from ..tasks.atari.open_game import known_game
from ..tasks.atari.patches import FramePatches
from ..tasks.atari.results import Results, read_results
from ..tasks.atari.settings import AtariSettings
from ..training import read_log
from .atari_fit import fit_atari
from .atari_report import write_report
from .atari_settings import read_settings

THREADS = 1  # of each run: a second one gains little on layers this small
EVALUATIONS = 5  # of a run, for its curve
SOURCE_SEED = 0
# Of a replay, for each step of an Atari game; what else it holds of one is a hundredth of that.
FRAME_BYTES = math.prod(FramePatches().shape)
PRELOAD = (__name__,)  # imported once, by the server that forks itself for each run
Fit = Callable[[AtariSettings, Path, bool, Console], "dict[str, Any] | None"]
# Settings in which a source's network must be as those of the runs that it is a source of.
OF_NETWORKS = ("hidden", "atoms", "v_min", "v_max", "patches", "widths")


@dataclass(frozen=True)
class Job:
    """A run. place: in the comparison's folder. needs: places of its sources."""

    name: str
    place: str
    settings: AtariSettings
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.place

    @property
    def before(self) -> tuple[str, ...]:
        return self.needs

    def failed(self, out_dir: Path) -> Path:
        return failed_of(out_dir, self.place)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Body:
    """Does a job in a process of its own; what it prints goes to the run's ``.log``.

    fit: what learns, as ``fit_atari``; it is pickled."""

    out_dir: Path
    fit: Fit

    def __call__(self, job: Job) -> None:
        with process_of_a_job(job.failed(self.out_dir), THREADS):
            _print_to(log_of(self.out_dir, job.place))
            for place in job.needs:
                if read_outcome(self.out_dir / place) is None:
                    raise ValueError(f"{place}, which it starts from, is not finished")
            console = Console(file=sys.stdout, width=100, emoji=False)
            if self.fit(job.settings, self.out_dir / job.place, True, console) is None:
                raise InterruptedError(f"stopped while learning in {job.place}")


def _print_to(path: Path) -> None:
    """Standard output and errors of this process, those of libraries in C too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)


def make_asked(
    sources: str,
    targets: str,
    methods: str = "all",
    seeds: Sequence[int] = (0,),
    steps: int = 20_000,
    source_steps: int | None = None,
    episodes: int = 30,
    set_: Sequence[str] = (),
) -> Asked:
    """What a command asks for. sources, targets, methods: names, apart by commas. source_steps:
    None: ``steps``. set_: KEY=VALUE, settings of all runs.

    Raises ValueError for names that are unknown, with the closest, and for settings that are
    impossible, or that the comparison itself decides.
    """
    settings = ComparisonSettings(
        sources=_games("sources", sources),
        steps=steps,
        source_steps=steps if source_steps is None else source_steps,
        episodes=episodes,
        set=other_settings(parse_set(set_, AtariSettings)),
    )
    chosen = choose_methods(methods, methods_of(settings.sources, settings.k))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different integers, got {list(seeds)}")
    names = tuple(method.name for method in chosen)
    return Asked(settings, _games("targets", targets), names, tuple(seeds))


def _games(argument: str, text: str) -> tuple[str, ...]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError(f"{argument}: expected games, apart by commas, got none")
    try:
        found = [known_game(name)[0] for name in names]
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"{argument}: expected different games, got {', '.join(found)}")
    return tuple(found)


def plan_jobs(asked: Asked, out_dir: Path, device: str = "cpu") -> list[Job]:
    """The sources that are needed, then the runs: by target, then by seed, so that what is there
    early is a table of all methods.

    Raises ValueError for settings that are impossible, or networks that do not fit each other.
    """
    jobs = []
    for game in asked.needed_sources():
        steps = asked.settings.source_steps
        made = _settings(asked.settings, game, FROM_SCRATCH, SOURCE_SEED, steps, out_dir, device)
        jobs.append(Job(f"source {game}", source_place(game), made))
    for game, method, seed in asked.places():
        made = _settings(asked.settings, game, method, seed, asked.settings.steps, out_dir, device)
        name = f"{game}, {method.title}, seed {seed}"
        needs = tuple(source_place(source) for source in method.sources)
        jobs.append(Job(name, run_place(game, method.name, seed), made, needs))
    networks = [{name: getattr(job.settings, name) for name in OF_NETWORKS} for job in jobs]
    for job, network in zip(jobs, networks, strict=True):
        if wrong := differences(networks[0], network):
            raise ValueError(
                f"{jobs[0].name} and {job.name} have networks that do not fit each other "
                f"({'; '.join(wrong)}); compare games of one kind"
            )
    return jobs


def _settings(
    settings: ComparisonSettings,
    game: str,
    method: Method,
    seed: int,
    steps: int,
    out_dir: Path,
    device: str,
) -> AtariSettings:
    """Of one run."""
    folders = [str((out_dir / source_place(source)).resolve()) for source in method.sources]
    given = {
        "eval_every": max(1, steps // EVALUATIONS),
        **settings.extra,
        "k": method.k or PAPER_K,
        "game": game, "method": method.method, "hub": folders, "seed": seed, "steps": steps,
        "final_episodes": settings.episodes, "device": device,
    }  # fmt: skip
    return read_settings(given)


def compare_atari(
    asked: Asked,
    out_dir: str | Path,
    jobs: int | None = None,
    device: str = "cpu",
    console: Console | None = None,
    fit: Fit = fit_atari,
) -> Results:
    """Does the runs that are missing, each in a process of one thread, and writes the report.

    Args:
        asked: see ``make_asked``. What earlier commands on the folder asked for stays in its table.
        out_dir: a new folder, or one of a comparison under the same settings.
        jobs: runs at a time; None: as many as there are cores, at most 4 and as memory has room
            for (on a GPU one).
        device: of all runs.
        fit: what each run does.

    Returns: what the folder holds. Runs that failed are in its ``failures``, and are tried again
    by the same command.

    Raises:
        ValueError: settings that are impossible, a folder of another comparison or one in use.
        InterruptedError: a signal came; the runs have saved, and the same command goes on.
    """
    console, out_dir = console or Console(), Path(out_dir)
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected an integer of at least 1, got {jobs}")
    count, _ = choose_workers(jobs, device)
    planned = plan_jobs(asked, out_dir, device)
    open_comparison(out_dir, asked, take=False)  # before there is a lock in it
    with locked(out_dir, "comparison", console):
        whole = open_comparison(out_dir, asked)
        _run_missing(planned, Body(out_dir, fit), count, console)
        results = read_results(out_dir, whole)
        if results.outcomes:
            page = write_report(results, out_dir / "report")
            console.print(f"The report is in {page}.", soft_wrap=True, markup=False)
    for place, reason in results.failures.items():
        console.print(
            f"[red]failed:[/] {escape(place)}: {escape(reason)}; its log is "
            f"{escape(str(log_of(out_dir, place)))}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    return results


def _run_missing(planned: Sequence[Job], body: Body, count: int, console: Console) -> None:
    out_dir = body.out_dir
    missing = [job for job in planned if read_outcome(out_dir / job.place) is None]
    replay = FRAME_BYTES * max((job.settings.steps for job in missing), default=0)
    count = workers_that_fit(count, 0, free_memory(), replay)
    text = f"{len(planned)} runs, {len(planned) - len(missing)} of them finished"
    if missing:
        text += f"; {len(missing)} to do, {count} at a time"
    console.print(f"{text}.", soft_wrap=True, highlight=False)
    if missing:
        with _Progress(console, len(missing), out_dir) as progress:
            Workers(body, out_dir, count, THREADS, PRELOAD).run(
                missing, lambda job: read_outcome(out_dir / job.place) is not None,
                progress.ended, progress.refresh,
            )  # fmt: skip


class _Progress(JobProgress):
    def __init__(self, console: Console, total: int, out_dir: Path):
        super().__init__(console, total)
        self.out_dir = out_dir

    def said(self, job: Job) -> str:
        outcome = read_outcome(self.out_dir / job.place)
        if outcome is not None:
            return f"{outcome.score:,.1f} points"
        reason = read_failure(job.failed(self.out_dir))
        log = log_of(self.out_dir, job.place)
        return f"[red]failed:[/] {escape(reason or '')}; its log is {escape(str(log))}"

    def share(self, job: Job) -> float:
        log = read_log(self.out_dir / job.place / "log.jsonl")
        return log[-1]["step"] / job.settings.steps if log else 0.0
