"""Read, change and write of one place at once: ``atom`` gives the old value, ``red`` none.

Threads take their turn in order of their numbers. Programs that wait for each other in a loop do
not end here, for none of them runs on while the others do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Code, Step, at, decodes
from .threads import Threads

_CHANGES: dict[str, Callable] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: new if old == expected else old,
}
_ORDERS = "relaxed acquire release acq_rel gpu cta sys"
_MODIFIERS = f"global shared shared::cta {_ORDERS} {' '.join(_CHANGES)}"


@decodes("atom", modifiers=_MODIFIERS)
def _atom(code: Code) -> Step:
    return _atomic(code, place=1)


@decodes("red", modifiers=_MODIFIERS)
def _red(code: Code) -> Step:
    return _atomic(code, place=0)


def _atomic(code: Code, place: int) -> Step:
    kind, shared = code.kind, code.is_shared()
    change = _CHANGES[code.one_of(*_CHANGES)]
    address = code.shared_address(place) if shared else code.address(place)
    operands = [code.source(i, kind) for i in range(place + 1, len(code.operands))]
    target = code.target(0, kind) if place == 1 else lambda threads, values: None

    def run(threads: Threads) -> None:
        which = threads.which()
        memory = threads.shared if shared else threads.memory
        given = [at(source(threads), which) for source in operands]
        places = memory.atomic(at(address(threads), which), kind.size, threads.who())
        cells, old = memory.cells(kind.size), np.zeros(len(which), kind.dtype)
        for i, row in enumerate(places // kind.size):
            old[i] = kind.values(cells[row].view(kind.unsigned))[0]
            new = np.array([change(old[i], *(operand[i] for operand in given))])
            cells[row] = kind.bits(new).view(np.uint8)
        target(threads, threads.spread(which, old))

    return run
