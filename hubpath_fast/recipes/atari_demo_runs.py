"""The runs of ``hubpath atari demo``: what each is, its process, and what it came to."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..checkpoints import CheckpointError
from ..compare.process import process_of_a_job
from ..compare.progress import JobProgress
from ..compare.results import read
from ..compare.workers import Workers
from ..notes import show_notes
from ..tasks.atari.comparison import HUB_K1, RESULT, Method, choose_methods, methods_of
from ..tasks.atari.settings import FINETUNE, HUB, SCRATCH, AtariSettings
from ..tasks.atari.small_games import GAMES, SETTINGS, Medley, SmallGame
from ..tasks.atari.sources import open_source
from ..training import read_log
from .atari_demo_games import play_medley, read_played
from .atari_fit import fit_atari

TARGET = Medley.name
SOURCES = tuple(game.name for game in GAMES)
METHODS = f"{SCRATCH},{FINETUNE},{HUB_K1},{HUB}"
STEPS = 8_000  # on the medley, of which each game has a third
THREADS = 1  # of each run: a second one gains nothing on layers this small
PRELOAD = (__name__, "torch._dynamo")


@dataclass(frozen=True)
class Plan:
    """What a demo runs. cache: folder of the sources. episodes: of the medley, by which each method
    is judged. changes: settings of all runs that are not those of the small games."""

    seed: int
    device: str
    cache: Path
    episodes: int
    changes: Mapping[str, Any]

    @property
    def methods(self) -> list[Method]:
        return choose_methods(METHODS, methods_of(SOURCES))

    def settings(self, game: str, method: Method | None = None) -> AtariSettings:
        """Of a run of a method, or of the source of a game."""
        steps = {"steps": STEPS} if game == TARGET else {}
        given = {**SETTINGS, **steps, **self.changes}
        given |= {"game": game, "seed": self.seed, "device": self.device}
        # The demo plays games of its own after the last step.
        given |= {"final_episodes": 1, "method": method.method if method else SCRATCH}
        if method and method.sources:
            given["hub"] = [str(self.source(name)) for name in method.sources]
        if method and method.k:
            given["k"] = method.k
        return AtariSettings.from_dict(given)

    def source(self, game: str) -> Path:
        """The folder of a source's run, by all that its weights hang on."""
        rules = [inspect.getsource(cls) for cls in (SmallGame, *GAMES)]
        plain = json.dumps([self.settings(game).to_dict(), torch.__version__, rules])
        return self.cache / "games" / f"{game}-{hashlib.sha256(plain.encode()).hexdigest()[:16]}"

    def to_dict(self) -> dict[str, Any]:
        """What must be equal for a stopped demo to go on."""
        runs = {method.name: self.settings(TARGET, method).to_dict() for method in self.methods}
        return {"episodes": self.episodes, **runs}

    def jobs(self) -> list[Job]:
        """All runs. The hubs take longest and come first, so that the last to end is short."""
        methods = sorted(self.methods, key=lambda method: -len(method.sources))
        return [
            *(Job(game, source=True) for game in SOURCES),
            *(Job(method.name, before=tuple(method.sources)) for method in methods),
        ]


@dataclass(frozen=True)
class Job:
    """A run: of the source of a game, or of a method on the medley. name: of either."""

    name: str
    source: bool = False
    before: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.name

    def failed(self, out_dir: Path) -> Path:
        return out_dir / "runs" / f"{self.name}.failed.json"

    def __str__(self) -> str:
        return f"source {self.name}" if self.source else self.name


def run_folder(out_dir: Path, method: str) -> Path:
    return out_dir / "runs" / method


@dataclass(frozen=True)
class Body:
    """What a process does with its job."""

    plan: Plan
    out_dir: Path

    def __call__(self, job: Job) -> None:
        plan = self.plan
        with process_of_a_job(job.failed(self.out_dir), THREADS):
            if job.source:
                _train(plan.settings(job.name), plan.source(job.name))
                return
            method = next(method for method in plan.methods if method.name == job.name)
            folder = run_folder(self.out_dir, job.name)
            _train(plan.settings(TARGET, method), folder)
            play_medley(folder, plan.episodes, plan.seed, plan.device)


def _train(settings: AtariSettings, folder: Path) -> None:
    if fit_atari(settings, folder, resume=True, console=Console(quiet=True)) is None:
        raise InterruptedError("stopped")


def run_missing(plan: Plan, out_dir: Path, count: int, console: Console) -> None:
    """Does the runs that are not finished, in up to ``count`` processes.

    Raises OSError, with the reason, if one failed; InterruptedError if a signal came.
    """
    for game in SOURCES:
        drop_damaged(plan.source(game), console)
    found = Outcomes(plan, out_dir)
    missing = [job for job in plan.jobs() if not found.is_done(job)]
    kept = [game for game in SOURCES if game not in {job.name for job in missing}]
    if kept:
        console.print(f"sources from the cache: {', '.join(kept)}", highlight=False)
    with _Progress(console, len(missing), found) as progress:
        workers = Workers(Body(plan, out_dir), out_dir, count, THREADS, PRELOAD)
        workers.run(missing, found.is_done, progress.ended, progress.refresh)
    for job in plan.jobs():  # the sources' first: what starts from them fails with them
        if not found.is_done(job):
            raise OSError(f"{job} failed: {found.failure(job)}")


@dataclass(frozen=True)
class Outcomes:
    """What the runs of a plan came to."""

    plan: Plan
    out_dir: Path

    def folder(self, job: Job) -> Path:
        return self.plan.source(job.name) if job.source else run_folder(self.out_dir, job.name)

    def is_done(self, job: Job) -> bool:
        folder = self.folder(job)
        return (folder / RESULT).is_file() and (job.source or read_played(folder) is not None)

    def text(self, job: Job) -> str:
        if job.source:
            return f"{read(self.folder(job) / RESULT)['curve'][-1][1]:.1f} points in its game"
        return f"{read_played(self.folder(job)).mean:.1f} points in the medley"

    def failure(self, job: Job) -> str:
        return (read(job.failed(self.out_dir)) or {}).get("error", "it left no result")


class _Progress(JobProgress):
    def __init__(self, console: Console, total: int, found: Outcomes):
        super().__init__(console, total)
        self.found = found

    def said(self, job: Job) -> str:
        if self.found.is_done(job):
            return self.found.text(job)
        return f"[red]failed:[/] {escape(self.found.failure(job))}"

    def share(self, job: Job) -> float:
        log = read_log(self.found.folder(job) / "log.jsonl")
        game = job.name if job.source else TARGET
        return log[-1]["step"] / self.found.plan.settings(game).steps if log else 0.0


def drop_damaged(folder: Path, console: Console) -> None:
    """Deletes a source that cannot be read any more, so that it is trained again."""
    if not (folder / RESULT).is_file():
        return
    try:
        open_source(folder)
    except (ValueError, OSError, CheckpointError):
        show_notes([f"the cached source in {folder} is damaged; training it again"], console)
        shutil.rmtree(folder)
