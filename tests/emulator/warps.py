"""Instructions that the threads of a warp carry out together: shuffles, votes, reductions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Code, Step, decodes
from .kinds import B32, PRED, S32, U32, Kind
from .memory import Fault
from .ptx import Unknown
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
    target_of, *ok_of = code.vector(0)
    target, oks = code.target(target_of, B32), [code.target(part, PRED) for part in ok_of]
    value, lane, clamp = code.source(1, B32), code.source(2, S32), code.source(3, S32)
    members = code.source(4, U32)

    def run(threads: Threads) -> None:
        _members(threads, members(threads), code.text)
        by, limits = by_warp(threads, lane(threads)) & 31, by_warp(threads, clamp(threads))
        segment = limits >> 8 & 31
        low, high = _LANE & segment, (_LANE & segment) | (limits & 31 & ~segment)
        origin, ok = {
            "idx": lambda: _bounded(low | (by & ~segment), high),
            "down": lambda: _bounded(_LANE + by, high),
            "bfly": lambda: _bounded(_LANE ^ by, high),
            "up": lambda: (_LANE - by, _LANE - by >= high),
        }[mode]()
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


def _bounded(origin: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return origin, origin <= high


_REDUCTIONS: dict[str, Callable] = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@decodes("redux", modifiers="sync add min max and or xor abs NaN")
def _redux(code: Code) -> Step:
    """One result for all members. Floats: min and max only, over numbers unless ``.NaN``."""
    kind, name = code.kind, code.one_of(*_REDUCTIONS)
    reduction, start = _REDUCTIONS[name], _start(name, kind)
    if kind.is_float:
        if name not in ("min", "max"):
            raise Unknown(code.text)
        skips_nan = "NaN" not in code.modifiers
        reduction = {"min": np.fmin, "max": np.fmax}[name] if skips_nan else reduction
    value, members, target = code.source(1, kind), code.source(2, U32), code.target(0, kind)

    def run(threads: Threads) -> None:
        theirs = _members(threads, members(threads), code.text)
        values = by_warp(threads, value(threads))
        values = np.abs(values) if "abs" in code.modifiers else values
        found = reduction.reduce(np.where(theirs, values, start), axis=1, dtype=kind.dtype)
        target(threads, np.repeat(found, WARP))

    return run


def _start(name: str, kind: Kind):
    """What changes nothing."""
    if kind.is_float:
        return kind.dtype.type(np.nan if name not in ("min", "max") else _infinity(name))
    limits = np.iinfo(kind.dtype)
    ends = {"min": limits.max, "max": limits.min, "and": -1 if kind.is_signed else limits.max}
    return kind.dtype.type(ends.get(name, 0))


def _infinity(name: str) -> float:
    return np.inf if name == "min" else -np.inf


@decodes("vote", modifiers="sync all any uni ballot")
def _vote(code: Code) -> Step:
    mode = code.one_of("all", "any", "uni", "ballot")
    source, members = code.source(1, PRED), code.source(2, U32)
    target = code.target(0, B32 if mode == "ballot" else PRED)

    def run(threads: Threads) -> None:
        theirs = _members(threads, members(threads), code.text)
        yes = by_warp(threads, source(threads)) & theirs
        no = theirs & ~yes
        found = {
            "all": lambda: ~no.any(axis=1),
            "any": lambda: yes.any(axis=1),
            "uni": lambda: ~(no.any(axis=1) & yes.any(axis=1)),
            "ballot": lambda: _mask(yes),
        }[mode]()
        target(threads, np.repeat(found, WARP))

    return run


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
    kind, mode = code.kind, code.one_of("any", "all")
    target_of, *ok_of = code.vector(0)
    target, oks = code.target(target_of, B32), [code.target(part, PRED) for part in ok_of]
    value, members = code.source(1, kind), code.source(2, U32)

    def run(threads: Threads) -> None:
        theirs = _members(threads, members(threads), code.text)
        values = by_warp(threads, value(threads))
        same = (values[:, :, None] == values[:, None, :]) & theirs[:, None, :]
        if mode == "all":
            same = np.where((same == theirs[:, None, :]).all(axis=2)[:, :, None], same, False)
        target(threads, _mask(same).reshape(-1))
        for found in oks:
            found(threads, same.any(axis=2).reshape(-1))

    return run


@decodes("elect", modifiers="sync")
def _elect(code: Code) -> Step:
    """The lowest member: its number, and whether a thread is it."""
    chosen_of, is_of = code.vector(0)
    chosen, is_chosen = code.target(chosen_of, B32), code.target(is_of, PRED)
    members = code.source(1, U32)

    def run(threads: Threads) -> None:
        theirs = _members(threads, members(threads), code.text)
        lowest = theirs.argmax(axis=1)
        chosen(threads, np.repeat(lowest, WARP).astype(np.uint32))
        is_chosen(threads, (lowest[:, None] == _LANE).reshape(-1))

    return run
