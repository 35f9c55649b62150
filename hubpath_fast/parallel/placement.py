"""Which rank has which expert: a step takes as long as its slowest rank, and memory is bounded.

Longest first: experts in the order of their work, each to the rank with the least work so far that
has room for it. Without a bound the slowest rank then has at most 4/3 - 1/(3 ranks) times the work
of the best placement that there is (Graham, 1969). With one there is no such promise, and room may
run out although a packing exists; then experts are packed by bytes alone, the largest first, each
to the first rank with room. That too may miss a packing, where memory is all but full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """owners: [M] for each expert the rank that has it. work: of each rank, in the unit of the
    costs. sizes: of each rank, bytes."""

    owners: tuple[int, ...]
    work: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """The largest work of a rank over the mean: 1 where all have as much."""
        total = sum(self.work)
        return max(self.work) * len(self.work) / total if total else 1.0


@dataclass(frozen=True)
class _Unit:
    """Experts that stay together."""

    experts: tuple[int, ...]
    work: float
    size: int


def plan(
    costs: Sequence[float],
    sizes: Sequence[int],
    ranks: int,
    memory: int | None = None,
    load: Sequence[float] | None = None,
    tied: Sequence[int] | None = None,
) -> Plan:
    """Places M experts on ranks. The same arguments give the same plan on every machine; among
    equals the lowest number comes first.

    Args:
        costs: [M] of a row, in any unit: counted operations, or measured time.
        sizes: [M] bytes that each expert takes on its rank.
        ranks: how many there are; some stay without experts where these are fewer.
        memory: bytes that a rank has for experts; None: no bound.
        load: [M] how many rows each expert gets, in any unit; None: all as many.
        tied: [M] for each expert the first that it shares memory with, often itself, as
            ``executors.sharing.Sharing`` finds; these stay together.

    Raises:
        ValueError: arguments that do not fit each other; no placement found within the memory.
    """
    count = len(costs)
    if ranks < 1:
        raise ValueError(f"ranks: expected an integer of at least 1, got {ranks}")
    for name, values in (("costs", costs), ("sizes", sizes), ("load", load), ("tied", tied)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: expected one for each of {count} experts, got {len(values)}")
    for name, values in (("costs", costs), ("sizes", sizes), ("load", load or ())):
        wrong = [value for value in values if not 0 <= value < math.inf]
        if wrong:
            raise ValueError(f"{name}: expected finite numbers of at least 0, got {wrong[0]}")
    work = [c * (1.0 if load is None else load[i]) for i, c in enumerate(costs)]
    units = _units(work, sizes, range(count) if tied is None else tied)
    found = _longest_first(units, ranks, memory) or _first_fit(units, ranks, memory)
    if found is None:
        raise ValueError(_refusal(units, ranks, memory))
    owners, total = [0] * count, [0] * ranks
    for unit, rank in zip(units, found, strict=True):
        total[rank] += unit.size
        for expert in unit.experts:
            owners[expert] = rank
    each = (math.fsum(w for w, o in zip(work, owners, strict=True) if o == r) for r in range(ranks))
    return Plan(tuple(owners), tuple(each), tuple(total))


def _units(work: Sequence[float], sizes: Sequence[int], tied: Sequence[int]) -> list[_Unit]:
    members: dict[int, list[int]] = {}
    for expert, first in enumerate(tied):
        members.setdefault(first, []).append(expert)
    return [
        _Unit(tuple(m), math.fsum(work[i] for i in m), sum(sizes[i] for i in m))
        for m in members.values()
    ]


def _longest_first(units: Sequence[_Unit], ranks: int, memory: int | None) -> list[int] | None:
    def choose(unit: _Unit, room: list[int], work: list[float], sizes: list[int]) -> int:
        # What takes no time would all go to one rank, so it goes where the fewest bytes are.
        return min(room, key=lambda r: (work[r] if unit.work else 0, sizes[r], r))

    return _place(units, ranks, memory, lambda unit: -unit.work, choose)


def _first_fit(units: Sequence[_Unit], ranks: int, memory: int | None) -> list[int] | None:
    return _place(units, ranks, memory, lambda unit: -unit.size, lambda _, room, *__: room[0])


def _place(
    units: Sequence[_Unit],
    ranks: int,
    memory: int | None,
    order: Callable[[_Unit], float],
    choose: Callable[[_Unit, list[int], list[float], list[int]], int],
) -> list[int] | None:
    """The rank of each unit; None where one found no room."""
    found, work, sizes = [0] * len(units), [0.0] * ranks, [0] * ranks
    for i in sorted(range(len(units)), key=lambda i: (order(units[i]), i)):
        unit = units[i]
        room = [r for r in range(ranks) if memory is None or sizes[r] + unit.size <= memory]
        if not room:
            return None
        found[i] = rank = choose(unit, room, work, sizes)
        work[rank] += unit.work
        sizes[rank] += unit.size
    return found


def _refusal(units: Sequence[_Unit], ranks: int, memory: int) -> str:
    total, largest = sum(unit.size for unit in units), max(units, key=lambda unit: unit.size)
    names = ", ".join(map(str, largest.experts))
    together = f"experts {names}, which share memory, need"
    who = f"expert {names} alone needs" if len(largest.experts) == 1 else together
    start = "memory: expected at least"
    if largest.size > memory:
        return (
            f"{start} {largest.size:,} bytes for experts on a rank, which {who}, got {memory:,}; "
            "take smaller batches, smaller experts or devices with more memory"
        )
    if total > ranks * memory:
        needed = -(-total // memory)
        return (
            f"{start} {-(-total // ranks):,} bytes for experts on each of {ranks} ranks, got "
            f"{memory:,}: all {sum(len(u.experts) for u in units)} experts need {total:,}, and the "
            f"largest {largest.size:,}; take at least {needed} ranks, or smaller batches"
        )
    return (
        f"memory: no way was found to pack experts of {total:,} bytes, the largest of "
        f"{largest.size:,}, into {ranks} ranks of {memory:,} bytes each; take one rank more, or "
        "smaller batches"
    )
