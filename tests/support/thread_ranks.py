"""Ranks for tests of what they agree on: threads of one process in place of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hubpath_fast.parallel import Ranks

SECONDS = 60


class Board:
    """Where the values of all ranks meet."""

    def __init__(self, world: int) -> None:
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(SECONDS)
        found = list(self.values)
        self.barrier.wait(SECONDS)
        return found


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """``Ranks`` whose values travel over a ``Board``."""

    board: Board = field(default=None, compare=False)

    def gather(self, value: Any, patient: bool = False) -> list[Any]:
        return self.board.gather(self.rank, value)


def run_threads(function: Callable[[Ranks], Any], dp: int, ep: int) -> list[Any]:
    """What ``function(ranks)`` returns, or the exception that it raises, on each rank."""
    world = dp * ep
    board, found = Board(world), [None] * world

    def run(rank: int) -> None:
        try:
            found[rank] = function(ThreadRanks(rank, world, dp, ep, board))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
