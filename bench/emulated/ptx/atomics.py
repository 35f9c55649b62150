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


@decodes("atom", "red", modifiers=f"global shared shared::cta {_ORDERS} {' '.join(_CHANGES)}")
def _atomic(code: Code) -> Step:
    kind, change = code.kind, _CHANGES[code.one_of(*_CHANGES)]
    place = 1 if code.opcode == "atom" else 0
    memory_of, address = code.memory(place)
    operands = [code.source(operand, kind) for operand in code.operands[place + 1 :]]
    target = code.target(0, kind) if place == 1 else lambda threads, values: None

    def run(threads: Threads) -> None:
        which, memory = threads.which(), memory_of(threads)
        given = [at(source(threads), which) for source in operands]
        places = memory.atomic(at(address(threads), which), kind.size, threads.who())
        cells = memory.cells(kind.size).view(kind.unsigned)
        old = np.zeros(len(which), kind.dtype)
        for i, row in enumerate(places // kind.size):
            old[i] = kind.values(cells[row : row + 1])[0]
            new = np.array([change(old[i], *(operand[i] for operand in given))])
            cells[row] = kind.bits(new)[0]
        target(threads, threads.spread(which, old))

    return run
