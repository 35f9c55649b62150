"""Which runs a comparison needs, and which of them need which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .results import run_folder

PREPARE = "prepare"  # the job that every other of its seed waits for

# Trained at every rate; the others follow a run's chosen rate, or train nothing.
TUNED = ("distill", "knowledge-flow", "zoo-tuning", "zoo-tuning-lite", "pathway")


@dataclass(frozen=True)
class Job:
    """A run of one seed. rate: of the bodies; None: that which ``follows`` was chosen at. tried:
    whether other rates are tried for the same run. needs: runs that must be finished before."""

    seed: int
    run: str
    rate: float | None = None
    tried: bool = False
    follows: str | None = None
    needs: tuple[str, ...] = ()

    def folder(self, out_dir: Path) -> Path:
        return run_folder(out_dir, self.seed, self.run, self.rate if self.tried else None)

    def __str__(self) -> str:
        rate = f", rate {self.rate:g}" if self.tried else ""
        return f"seed {self.seed}: {self.run}{rate}"


def plan_jobs(
    runs: Iterable[str], seed: int, rates: Sequence[float], num_experts: int, k: int
) -> list[Job]:
    """The jobs of one seed: first those that others wait for, then the longest."""

    def rank(run: str) -> tuple[bool, bool, int]:
        first = run.startswith("single"), run == "pathway"
        return (not first[0], not first[1], -training_forwards(run, num_experts, k))

    singles = tuple(f"single-{i}" for i in range(num_experts))
    jobs = []
    for run in sorted(dict.fromkeys(runs), key=rank):
        needs: tuple[str, ...] = ()
        if run in ("distill", "knowledge-flow") or run.startswith("soup"):
            needs = singles
        if run in TUNED or run in singles:
            tried = len(rates) > 1
            jobs += [Job(seed, run, rate, tried, None, needs) for rate in rates]
        elif run.startswith("soup"):
            jobs.append(Job(seed, run, rates[0], needs=needs))
        else:
            jobs.append(Job(seed, run, follows="pathway", needs=("pathway",)))
    return jobs


def training_forwards(run: str, num_experts: int, k: int) -> int:
    """Expert forwards per sample and step of a run's training (soups, which train nothing: 0)."""
    if run.startswith("soup"):
        return 0
    if run == "distill":
        return num_experts + 1
    if run == "knowledge-flow":  # the student with its teachers, and as it was an update before
        return num_experts + 2
    if run.startswith(("single", "zoo")):
        return 1
    return int(run.removeprefix("pathway-k")) if run.startswith("pathway-k") else k
