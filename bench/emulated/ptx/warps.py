"""Instructions that the threads of a warp carry out together: shuffles, votes, reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .arithmetic import extreme
from .decode import Code, Source, Step, Target, decodes
from .kinds import B32, PRED, S32, U32, Kind
from .memory import Fault
from .parse import Unknown
from .threads import WARP, Threads

_LANE = np.arange(WARP)


def by_warp(threads: Threads, values: np.ndarray) -> np.ndarray:
    """[T] or [1] as [warps, 32]."""
    return np.broadcast_to(values, threads.count).reshape(-1, WARP)


def _members(threads: Threads, mask: np.ndarray, text: str) -> np.ndarray:
    """[warps, 32]: the lanes that an active thread's ``mask`` names, all of which must be active.

    On a GPU a thread waits for those named; here they would have come along if they were to come.
    """
    named = (by_warp(threads, mask).astype(np.int64)[:, :, None] >> _LANE & 1).astype(np.bool_)
    if threads.active is None:
        return named.any(axis=1)
    active = threads.active.reshape(-1, WARP)
    members = (named & active[:, :, None]).any(axis=1)
    if (members & ~active).any():
        raise Fault(f"{text}: names threads that do not take part")
    return members


@decodes("shfl", modifiers="sync idx up down bfly")
def _shfl(code: Code) -> Step:
    """target|ok, value, lane or distance, segment and clamp, members"""
    mode = code.one_of("idx", "up", "down", "bfly")
    target, *oks = _with_predicates(code)
    value, lane, clamp = code.source(1, B32), code.source(2, S32), code.source(3, S32)
    members = code.source(4, U32)

    def run(threads: Threads) -> None:
        _members(threads, members(threads), code.text)
        by, limits = by_warp(threads, lane(threads)) & 31, by_warp(threads, clamp(threads))
        segment = limits >> 8 & 31
        low, high = _LANE & segment, (_LANE & segment) | (limits & 31 & ~segment)
        origin = {
            "idx": low | (by & ~segment), "down": _LANE + by, "bfly": _LANE ^ by, "up": _LANE - by,
        }[mode]  # fmt: skip
        ok = origin >= high if mode == "up" else origin <= high
        origin = np.where(ok, origin, _LANE)
        if threads.active is not None:
            active = threads.active.reshape(-1, WARP)
            if (active & ~np.take_along_axis(active, origin, axis=1)).any():
                raise Fault(f"{code.text}: reads a thread that does not take part")
        moved = np.take_along_axis(by_warp(threads, value(threads)), origin, axis=1)
        target(threads, moved.reshape(-1))
        for found in oks:
            found(threads, ok.reshape(-1))

    return run


def _among_members(
    code: Code, value: Source, members: int, targets: Sequence[Target], function: Callable
) -> Step:
    """``function`` of the members and the values, both [warps, 32], gives results of whole warps
    or of lanes, [warps] or [warps, 32], one for each target. members: the number of their operand.
    """
    mask = code.source(members, U32)

    def run(threads: Threads) -> None:
        theirs = _members(threads, mask(threads), code.text)
        results = function(theirs, by_warp(threads, value(threads)))
        for target, found in zip(targets, results, strict=False):
            lanes = np.broadcast_to(found.reshape(len(theirs), -1), theirs.shape)
            target(threads, lanes.reshape(-1))

    return run


_REDUCTIONS: dict[str, Callable] = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@decodes("redux", modifiers="sync add min max and or xor abs NaN")
def _redux(code: Code) -> Step:
    """One result for all members. Floats: min and max only, over numbers unless ``.NaN``."""
    kind, name = code.kind, code.one_of(*_REDUCTIONS)
    if kind.is_float and name not in ("min", "max"):
        raise Unknown(code.text)
    reduction = extreme(code, name) if name in ("min", "max") else _REDUCTIONS[name]
    start = _start(name, kind)

    def reduced(members: np.ndarray, values: np.ndarray) -> tuple[np.ndarray]:
        values = np.abs(values) if "abs" in code.modifiers else values
        values = np.where(members, values, start)
        return (reduction.reduce(values, axis=1, dtype=kind.dtype),)

    return _among_members(code, code.source(1, kind), 2, [code.target(0, kind)], reduced)


def _start(name: str, kind: Kind):
    """What changes nothing."""
    if kind.is_float:
        return kind.dtype.type(np.inf if name == "min" else -np.inf)
    limits = np.iinfo(kind.dtype)
    ends = {"min": limits.max, "max": limits.min, "and": -1 if kind.is_signed else limits.max}
    return kind.dtype.type(ends.get(name, 0))


@decodes("vote", modifiers="sync all any uni ballot")
def _vote(code: Code) -> Step:
    mode = code.one_of("all", "any", "uni", "ballot")

    def vote(members: np.ndarray, values: np.ndarray) -> tuple[np.ndarray]:
        yes, no = values & members, ~values & members
        if mode == "ballot":
            return (_mask(yes),)
        some, others = yes.any(axis=1), no.any(axis=1)
        return ({"all": ~others, "any": some, "uni": ~(others & some)}[mode],)

    target = code.target(0, B32 if mode == "ballot" else PRED)
    return _among_members(code, code.source(1, PRED), 2, [target], vote)


def _mask(lanes: np.ndarray) -> np.ndarray:
    """[..., 32] truth values as one number."""
    return (lanes.astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=-1).astype(np.uint32)


@decodes("activemask")
def _activemask(code: Code) -> Step:
    target = code.target(0, B32)

    def run(threads: Threads) -> None:
        everyone = np.ones(threads.count, np.bool_)
        active = by_warp(threads, everyone if threads.active is None else threads.active)
        target(threads, np.repeat(_mask(active), WARP))

    return run


@decodes("match", modifiers="any all sync")
def _match(code: Code) -> Step:
    """Which members hold the same value: any, or all members if they all do and else none."""
    mode = code.one_of("any", "all")

    def match(members: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        same = (values[:, :, None] == values[:, None, :]) & members[:, None, :]
        if mode == "all":
            same &= (same == members[:, None, :]).all(axis=2, keepdims=True)
        return _mask(same), same.any(axis=2)

    targets = _with_predicates(code)
    return _among_members(code, code.source(1, code.kind), 2, targets, match)


def _with_predicates(code: Code) -> list[Target]:
    """Of operand 0: a number, and ``|%p`` if it is there."""
    number, *predicates = code.vector(0)
    return [code.target(number, B32), *(code.target(part, PRED) for part in predicates)]


@decodes("elect", modifiers="sync")
def _elect(code: Code) -> Step:
    """The lowest member: its number, and whether a thread is it."""

    def elect(members: np.ndarray, _) -> tuple[np.ndarray, np.ndarray]:
        lowest = members.argmax(axis=1)
        return lowest, lowest[:, None] == _LANE

    return _among_members(code, code.source(1, U32), 1, _with_predicates(code), elect)
