"""The jobs of a comparison: which there are, which wait for which, and in which order they start.

A job is a method's run at one rate, or one of the jobs that get a seed ready: PREPARE, which reads
the data and notes what all methods share, and the pre-training of experts that have no weights yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .methods import Method
from .results import FAILED, run_folder

PREPARE, PRETRAIN = "prepare", "pretrain-"

# Of an expert that gets few samples of a batch: a row takes about twice as long as in a whole
# batch, whose layers use the cores better.
SMALL_GROUPS = 2.0


@dataclass(frozen=True)
class Job:
    """A run of one seed.

    rate: of the bodies; None: that which ``follows`` was chosen at, or nothing is trained. tried:
    whether other rates are tried for the same run. needs: runs that must be finished before. cost:
    how long it takes, in any unit. length: see ``Method``. method: the name of the method that it
    is the run of, if so.
    """

    seed: int
    run: str
    rate: float | None = None
    tried: bool = False
    follows: str | None = None
    needs: tuple[str, ...] = ()
    cost: float = 0.0
    length: float = 1.0
    method: str = ""

    def folder(self, out_dir: Path) -> Path:
        return run_folder(out_dir, self.seed, self.run, self.rate if self.tried else None)

    @property
    def key(self) -> tuple[int, str]:
        """The same at all rates."""
        return self.seed, self.run

    @property
    def before(self) -> tuple[tuple[int, str], ...]:
        if self.run == PREPARE:
            return ()
        return tuple((self.seed, run) for run in (*self.needs, PREPARE))

    def failed(self, out_dir: Path) -> Path:
        return self.folder(out_dir) / FAILED

    @property
    def name(self) -> str:
        """As progress shows it: an expert alone by the expert's name, not its number."""
        name = self.method or self.run
        return f"{name} at {self.rate:g}" if self.tried else name

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.name}"


def needed_runs(chosen: Iterable[Method], known: Sequence[Method]) -> list[Method]:
    """The methods with a run of their own that ``chosen`` are or need, in the order of ``known``.

    Needs of needs there are none.
    """
    chosen = list(chosen)
    wanted = {method.run for method in chosen}.union(*(method.waits_for for method in chosen))
    return [method for method in known if method.train is not None and method.run in wanted]


def plan_jobs(
    methods: Sequence[Method],
    seed: int,
    rates: Sequence[float],
    expert_costs: Sequence[float],
    pretrain: Mapping[int, tuple[int, ...]] | None = None,
    pretrain_cost: float = 1.0,
) -> list[Job]:
    """The jobs of one seed, those first that most work waits for: then the last to end is short.

    Args:
        methods: with runs of their own; see ``needed_runs``.
        seed: theirs.
        rates: every tuned method is trained at each.
        expert_costs: of each expert, in any unit.
        pretrain: the experts to pre-train, by number, and which must be pre-trained before each.
        pretrain_cost: of a pre-training, where an expert's fine-tuning costs 1.
    """
    pretrain = pretrain or {}
    mean = sum(expert_costs) / len(expert_costs)
    jobs = [
        Job(
            seed, f"{PRETRAIN}{i}", needs=tuple(f"{PRETRAIN}{j}" for j in before if j in pretrain),
            cost=pretrain_cost * expert_costs[i],
        )
        for i, before in pretrain.items()
    ]  # fmt: skip
    for method in methods:
        number = method.run.removeprefix("single-")
        own = [int(number)] if number.isdigit() else range(len(expert_costs))
        needs = *method.waits_for, *(f"{PRETRAIN}{i}" for i in own if i in pretrain)
        share = expert_costs[own[0]] if number.isdigit() else SMALL_GROUPS * mean
        tried = method.tuned and len(rates) > 1
        for rate in rates if method.tuned else rates[:1]:
            rate = rate if method.tuned else None
            length = float(method.length)
            cost = 0.0 if method.together else length * method.forwards * share
            jobs.append(
                Job(seed, method.run, rate, tried, method.follows, needs, cost, length, method.name)
            )
    return sorted(jobs, key=lambda job: -_path(job, jobs))


def _path(job: Job, jobs: Sequence[Job]) -> float:
    """The work of the longest chain of jobs that begins with this one."""
    after = [_path(other, jobs) for other in jobs if job.run in other.needs]
    return job.cost + max(after, default=0.0)
