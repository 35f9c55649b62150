"""The processes that train one model together: who this one is, and what they must agree on.

``Ranks`` is plain integers, so that it can be copied and compared; the process groups behind it are
``connection``'s. All transport is ``torch.distributed``'s.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ..worker_failure import worker_failure
from . import connection
from .failure import RankFailure, last_words, like, words_of
from .share import Share

T = TypeVar("T")
STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


@dataclass(frozen=True)
class Ranks:
    """This process and the others of a run.

    Rank ``r`` has the experts of ``ep_rank`` r mod ep, and belongs to replica ``dp_rank`` r // ep:
    each of the dp replicas has all experts once, shared out over its ep ranks. By default a single
    process, for which every method gives its one value and does nothing else.
    """

    rank: int = 0
    world: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.dp * self.ep != self.world or not 0 <= self.rank < self.world:
            raise ValueError(
                f"ranks: expected rank in 0..{self.world - 1} and dp * ep = {self.world}, got rank "
                f"{self.rank}, dp {self.dp}, ep {self.ep}"
            )

    @property
    def single(self) -> bool:
        return self.world == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that logs, writes and speaks."""
        return self.rank == 0

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep

    @property
    def dp_rank(self) -> int:
        return self.rank // self.ep

    def own(self, owners: Sequence[int]) -> list[int]:
        """The experts that this rank has. owners: for each the rank of a replica that has it."""
        return [index for index, owner in enumerate(owners) if owner == self.ep_rank]

    def share(self, parts: int = 1) -> Share:
        """This rank's part of a global batch that is cut into so many micro-batches."""
        return Share(self.rank, self.world, parts)

    def gather(self, value: T, patient: bool = False) -> list[T]:
        """The values of all ranks, in their order, on every rank; any that can be pickled.

        patient: whether the others may come up to two hours later.
        """
        if self.single:
            return [value]
        values: list[Any] = [None] * self.world
        with self.lost_peers():
            dist.all_gather_object(values, value, group=group(self, "patient") if patient else None)
        return values

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """Around what each rank does by itself: what one raises, all raise.

        The rank that failed raises its own exception, the others one of the same kind that names
        the rank. There must be no collective within. what: is done here, for those messages, such
        as "opening the data".
        """
        if self.single:
            yield
            return
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.raise_together(error, what)

    def raise_together(self, error: Exception | None, what: str) -> None:
        """Raises on all ranks if any has an error; see ``agreed``."""
        if self.single:
            if error is not None:
                raise error
            return
        found = self.gather(None if error is None else words_of(error), patient=True)
        failed = [rank for rank, words in enumerate(found) if words is not None]
        if not failed:
            return
        if error is None:
            first = failed[0]
            error = like(found[first], f"rank {first}, {what}: ")
        error.agreed = True  # so that one rank is enough to print it
        raise error

    def check_same(self, values: Mapping[str, Any]) -> None:
        """ValueError, on all ranks, for the first key whose value is not the same on every rank."""
        found = self.gather(dict(values), patient=True)
        for key in dict.fromkeys(key for each in found for key in each):
            first = found[0].get(key)
            others = [rank for rank, each in enumerate(found) if each.get(key) != first]
            if others:
                there = found[others[0]].get(key)
                error = ValueError(
                    f"{key}: expected the same on every rank, got {first!r} on rank 0 and "
                    f"{there!r} on rank{'s' * (len(others) > 1)} {_numbers(others)}; start all "
                    "ranks with the same command, package versions and data"
                )
                error.agreed = True
                raise error

    def barrier(self) -> None:
        """Returns once every rank is here; patient."""
        self.gather(None, patient=True)

    @contextmanager
    def lost_peers(self) -> Iterator[None]:
        """Around a collective: RankFailure where another rank ended, or did not come in time."""
        try:
            yield
        except RankFailure:
            raise
        except RuntimeError as error:
            if worker_failure(error) is not None:  # torch raises it wherever this process is
                raise
            raise RankFailure.of(error, self.world, connection.store()) from error

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """Around all that a rank does: what ends it is told to the others, who wait for it."""
        with last_words(self.rank, None if self.single else connection.store()):
            yield


def start(
    parallel: str | None = None,
    num_experts: int | None = None,
    device: str = "cpu",
    seconds: float = connection.SECONDS,
) -> Ranks:
    """The ranks that ``torchrun`` has started, connected; a single one where it has not.

    A process group that exists already is used as it is. Collective: all ranks call it alike.

    Args:
        parallel: "ep" shares the experts out over all ranks; "dp" gives each rank all of them;
            "DPxEP", such as "2x4": so many replicas of so many ranks each. None: ep where there are
            at least as many experts as ranks, else dp.
        num_experts: M, of the hub.
        device: where the model will be: "cpu" or "cuda".
        seconds: that a rank waits for the others in a step.

    Raises:
        ValueError: another ``parallel``, one that does not fit the number of ranks, or more ranks
            than experts that they could share out.
    """
    if _world()[0] == 1:
        layout(parallel, 1, num_experts)
        return Ranks()
    connection.connect(device, seconds)
    world, rank = _world()
    try:
        dp, ep = layout(parallel, world, num_experts)
    except ValueError as error:
        error.agreed = True  # every rank finds the same
        raise
    connection.make_groups(rank, dp, ep, seconds)
    return Ranks(rank, world, dp, ep)


def stop() -> None:
    """Closes the connection that ``start`` made; at the end of a process it is closed anyway."""
    connection.close()


def everyone() -> Ranks:
    """All ranks of the process group that there is, whoever made it; a single one without any."""
    return started() if connection.exists() else Ranks()


def started() -> Ranks:
    """All ranks that were started, connected or not yet."""
    world, rank = _world()
    return Ranks(rank, world, world, 1)


def layout(parallel: str | None, world: int, num_experts: int | None = None) -> tuple[int, int]:
    """(dp, ep) of so many ranks; ValueError as ``start`` says."""
    if parallel is None:
        parallel = "ep" if num_experts is None or num_experts >= world else "dp"
    parallel = read_layout(parallel)
    if parallel in ("ep", "dp"):
        dp, ep = (1, world) if parallel == "ep" else (world, 1)
    else:
        dp, ep = map(int, parallel.split("x"))
    if dp * ep != world:
        raise ValueError(
            f"parallel: expected {world} ranks in all, as many as were started, got {parallel!r}, "
            f"{dp} x {ep} = {dp * ep}; start {dp * ep} with torchrun --nproc-per-node, or give "
            "other numbers"
        )
    if num_experts is not None and ep > num_experts:
        idle = [rank for rank in range(world) if rank % ep >= num_experts]
        raise ValueError(
            f"parallel: expected at most as many ranks as experts to share them out, got {ep} "
            f"ranks for {num_experts} experts: rank{'s' * (len(idle) > 1)} {_numbers(idle)} would "
            f"be idle; start {num_experts} ranks, or take --parallel dp"
        )
    return dp, ep


def read_layout(text: str) -> str:
    """ "ep", "dp" or "DPxEP" as it is; ValueError for anything else."""
    if re.fullmatch(r"ep|dp|[1-9]\d*x[1-9]\d*", text) is None:
        raise ValueError(f"parallel: expected ep, dp or DPxEP, such as 2x4, got {text!r}")
    return text


def group(ranks: Ranks, name: str) -> Any:
    """A process group: "world", "ep" (a replica's ranks), "dp" (the ranks with the same experts) or
    "patient" (all, on the CPU, with a long timeout)."""
    if name == "world" or (name == "ep" and ranks.dp == 1) or (name == "dp" and ranks.ep == 1):
        return None  # torch's default
    return connection.group(ranks.dp, ranks.ep, name)


def _world() -> tuple[int, int]:
    """(ranks, this one), of the process group there is, or of torchrun's environment."""
    if connection.exists():
        return dist.get_world_size(), dist.get_rank()
    if not all(name in os.environ for name in STARTED):
        return 1, 0
    return int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])


def on_this_machine() -> int:
    """How many ranks torchrun has started on this machine; 1 where it has not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def voice(error: BaseException) -> Iterator[bool]:
    """Around what is printed of an error that ends this process: whether this rank is to say it.

    What all ranks know the first one says, and the others wait until it has, since torchrun ends
    all of them once one is gone. Of what one rank met alone, or of a rank that is lost, whoever is
    the first to come speaks.
    """
    ranks, store, known = started(), connection.store(), getattr(error, "agreed", False)
    if ranks.single:
        yield True
    elif store is None:
        if not (connection.exists() or ranks.is_first):
            time.sleep(connection.SAY_SECONDS)
        yield ranks.is_first or (connection.exists() and not known)
    elif known and not ranks.is_first:
        with suppress(RuntimeError):
            store.wait(["said"], timedelta(seconds=connection.SAY_SECONDS))
        yield False
    else:
        first = True
        with suppress(RuntimeError):
            first = store.add("said", 1) == 1
        yield first or not isinstance(error, RankFailure)


def _numbers(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown + (f" and {len(values) - 8} more" if len(values) > 8 else "")
