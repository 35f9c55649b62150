"""The threads of several programs in lock-step: their registers, who of them takes part, barriers.

Threads are numbered over all programs, T = programs x threads a program. A register is an array of
T numbers and is never changed in place: writing makes a new one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .kinds import PRED
from .memory import PHASE, Fault, GlobalMemory, SharedMemory, Who
from .parse import Kernel

WARP = 32
# What a register holds before it is written: as a number large, as an address nobody's.
_POISON = 0xDEADBEEFDEADBEEF


class Asynchronous:
    """Operations that go on by themselves until a thread waits for the group they are in.

    Each thread counts its own groups, as the hardware does.
    """

    def __init__(self, threads: int) -> None:
        self.committed = np.zeros(threads, np.int64)
        # The threads of an operation, their groups, who has still to wait, and what finishes it.
        self._going: list[tuple[np.ndarray, np.ndarray, np.ndarray, Callable]] = []

    def start(self, threads: np.ndarray, finish: Callable[[np.ndarray], None]) -> None:
        """``finish`` is called with which of ``threads`` waited, perhaps several times."""
        pending = np.ones(len(threads), np.bool_)
        self._going.append((threads, self.committed[threads], pending, finish))

    def commit(self, threads: np.ndarray) -> None:
        self.committed[threads] += 1

    def wait(self, threads: np.ndarray, newest: int) -> None:
        """All groups but the ``newest`` of each thread's are finished."""
        waits = np.zeros(len(self.committed), np.bool_)
        waits[threads] = True
        for theirs, group, pending, finish in self._going:
            done = pending & waits[theirs] & (group < self.committed[theirs] - newest)
            if done.any():
                finish(done)
                pending &= ~done
        self._going = [one for one in self._going if one[2].any()]


@dataclass
class Threads:
    """Programs ``first`` to ``first + programs - 1`` of a launch."""

    kernel: Kernel
    parameters: dict[str, np.ndarray]  # name -> its bits, [1]
    symbols: dict[str, int]  # name -> address
    memory: GlobalMemory
    shared: SharedMemory
    grid: tuple[int, int, int]
    first: int
    programs: int
    # The threads that the current instruction is for: None for all.
    active: np.ndarray | None = None
    call_parameters: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        each = self.kernel.num_threads
        self.count = self.programs * each
        self.everyone = np.arange(self.count)
        self.thread = self.everyone % each
        self.program = self.everyone // each + self.first
        self.warp = self.thread // WARP
        self.barriers = np.zeros(self.programs, np.int64)
        self._who: Who | None = None  # of all threads, between two barriers
        self.copies, self.products = Asynchronous(self.count), Asynchronous(self.count)
        poison = {
            size: np.full(self.count, _POISON & ((1 << 8 * size) - 1), f"u{size}")
            for size in (1, 2, 4, 8)
        }
        false = np.zeros(self.count, np.bool_)
        self.registers = [
            false if register.kind is PRED else poison[register.kind.size]
            for register in self.kernel.registers.values()
        ]
        for name in self.kernel.specials:
            values = self._special(name)
            self.registers[self.kernel.registers[name].index] = values.astype(np.uint32)

    def _special(self, name: str) -> np.ndarray:
        """What a register such as %ctaid.x holds."""
        what, _, axis = name.removeprefix("%").partition(".")
        width, height, depth = self.grid
        per_axis = {
            "tid": (self.thread, 0, 0),
            "ntid": (self.kernel.num_threads, 1, 1),
            "ctaid": (
                self.program % width,
                self.program // width % height,
                self.program // (width * height),
            ),
            "nctaid": (width, height, depth),
        }
        lane = self.thread % WARP
        others = {
            "laneid": lane,
            "warpid": self.warp,
            "lanemask_eq": 1 << lane,
            "lanemask_lt": (1 << lane) - 1,
            "lanemask_le": (2 << lane) - 1,
            "lanemask_gt": -(2 << lane),
            "lanemask_ge": -(1 << lane),
        }
        value = per_axis[what]["xyz".index(axis)] if what in per_axis else others[what]
        return np.broadcast_to(value, self.count) & 0xFFFFFFFF

    def which(self) -> np.ndarray:
        """The numbers of the active threads."""
        return self.everyone if self.active is None else np.flatnonzero(self.active)

    def who(self, which: np.ndarray | None = None) -> Who:
        """What memory wants to know about the active threads, or about ``which``."""
        if self._who is None:
            barriers = self.barriers[self.program - self.first]
            phase = barriers * math.prod(self.grid) + self.program + 1
            self._who = Who(self.program, phase * PHASE + self.warp)
        found = self._who
        if which is None and self.active is None:
            return found
        return found.some(self.which() if which is None else which)

    def pass_barrier(self, programs: np.ndarray) -> None:
        self.barriers[programs] += 1
        self._who = None

    def write(self, index: int, bits: np.ndarray) -> None:
        """Set a register of the active threads to [T] or [1] bits."""
        if len(bits) != self.count:
            bits = np.repeat(bits, self.count)
        if self.active is not None:
            bits = np.where(self.active, bits, self.registers[index])
        self.registers[index] = bits

    def spread(self, which: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """[T] bits of which only those of the threads ``which`` count."""
        if which is self.everyone:
            return bits
        found = np.zeros(self.count, bits.dtype)
        found[which] = bits
        return found

    def warps(self, instruction: str) -> np.ndarray:
        """The numbers of the active warps, for what whole warps do together."""
        if self.active is None:
            return np.arange(self.count // WARP)
        lanes = self.active.reshape(-1, WARP)
        whole = lanes.all(axis=1)
        if (lanes.any(axis=1) != whole).any():
            raise Fault(f"{instruction} by a part of a warp")
        return np.flatnonzero(whole)
