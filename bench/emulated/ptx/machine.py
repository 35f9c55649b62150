"""Run a kernel: blocks of instructions on all threads of many programs at once.

Threads that took different branches run one block after the other, the earliest in the text first,
which brings them together again where their paths meet. Threads that wait at a barrier go on once
nobody else can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Imported for the decoders that they register.
from . import arithmetic, atomics, bits, matrices, transfers, warps  # noqa: F401
from .decode import Code, Step, decode, guarded
from .kinds import B32, PRED
from .memory import Buffer, Fault, GlobalMemory, SharedMemory
from .parse import Block, Instruction, Kernel, Unknown, ends, parse
from .threads import Threads

# Programs are run together while they have no more threads than this: beyond, numpy's cost of a
# call no longer matters and memory does.
TOGETHER = 8192
MOST_BLOCKS = 100_000  # a run of more has no end
_REDUCTIONS = ("popc", "and", "or")  # of bar.red


class _Ready(NamedTuple):
    """A block whose instructions are functions; ``last``: the one that decides how to go on."""

    steps: list[Step]
    last: Instruction | None


class Program:
    """PTX text made ready to run, as often as one likes."""

    def __init__(self, text: str) -> None:
        self.kernel = parse(text)
        symbols = {"global_smem": 0}
        for i, name in enumerate(self.kernel.constants):
            symbols[name] = 1 + i  # known apart, and no address of anything
        self.symbols = symbols
        self.blocks = [_ready(block, self.kernel, symbols) for block in self.kernel.blocks]
        self.global_granule, self.shared_granule = _granules(self.kernel)

    def launch(
        self,
        grid: Sequence[int],
        arguments: Sequence[int | np.ndarray],
        buffers: Sequence[Buffer],
        shared_size: int = 0,
    ) -> None:
        """Run the grid. Results are in the buffers' data afterwards.

        arguments: the parameters' values in order, as numbers or [1] arrays of bits; addresses
        are ``GlobalMemory.address(number of buffer, offset)``. Those left out are 0.

        Raises Fault for what is wrong with the kernel, with the instruction and the program.
        """
        kernel = self.kernel
        values = [*arguments, *[0] * (len(kernel.parameters) - len(arguments))]
        parameters = {
            # A float's bits are those of its type.
            name: value.view(kind.unsigned) if isinstance(value, np.ndarray) else kind.of(value)
            for (name, kind), value in zip(kernel.parameters, values, strict=True)
        }
        grid = (*grid, 1, 1)[:3]
        memory = GlobalMemory(buffers, self.global_granule)
        self._run(memory, parameters, grid, shared_size)
        if (both := memory.touched()).any():
            memory = GlobalMemory(buffers, self.global_granule, both)
            self._run(memory, parameters, grid, shared_size)
        try:
            memory.finish()
        except Fault as fault:
            raise Fault(f"{kernel.name}: {fault}") from None

    def _run(
        self,
        memory: GlobalMemory,
        parameters: dict[str, np.ndarray],
        grid: tuple[int, int, int],
        shared_size: int,
    ) -> None:
        kernel = self.kernel
        total, together = int(np.prod(grid)), max(TOGETHER // kernel.num_threads, 1)
        for first in range(0, total, together):
            programs = min(together, total - first)
            shared = SharedMemory(first, programs, shared_size, self.shared_granule)
            threads = Threads(
                kernel, parameters, self.symbols, memory, shared, grid, first, programs
            )
            with np.errstate(all="ignore"):
                _Run(self, threads).run()


def _ready(block: Block, kernel: Kernel, symbols: Mapping[str, int]) -> _Ready:
    *body, last = block or [None]
    if last is not None and not ends(last):
        body, last = [*body, last], None
    if last is not None and last.opcode in ("bar", "barrier"):
        _check_barrier(last)
    return _Ready([decode(i, kernel, symbols) for i in body], last)


def _check_barrier(barrier: Instruction) -> None:
    """Only barriers of all of a program's threads are known: number 0, without a count."""
    numbers = [o for o in barrier.operands if not o.startswith(("%", "!"))]
    if numbers != ["0"] or {*barrier.modifiers} - {"sync", "aligned", "cta", "red", *_REDUCTIONS}:
        raise Unknown(barrier.text)


def _granules(kernel: Kernel) -> tuple[int, int]:
    """The least sizes of an access to global and to shared memory."""
    sizes = {"global": [16], "shared": [16]}
    for instruction in (i for block in kernel.blocks for i in block):
        space = {m.removesuffix("::cta") for m in instruction.modifiers} & set(sizes)
        if instruction.opcode in ("atom", "red") and space:
            sizes[space.pop()].append(instruction.kinds[0].size)
        elif instruction.opcode in ("ld", "st") and space:
            data = instruction.operands[0 if instruction.opcode == "ld" else 1]
            parts = len(data) if isinstance(data, tuple) else 1
            sizes[space.pop()].append(instruction.kinds[0].size * parts)
        elif instruction.opcode == "cp" and len(instruction.operands) > 2:
            sizes["shared"].append(int(instruction.operands[2], 0))
            # What it reads may be fewer bytes than it writes, and is known only when it runs.
            sizes["global"].append(4)
        elif instruction.opcode == "wgmma":
            sizes["shared"].append(2)
    return min(sizes["global"]), min(sizes["shared"])


class _Run:
    """One run of some programs: which threads wait before which block, and at which barrier."""

    def __init__(self, program: Program, threads: Threads) -> None:
        self.program, self.threads = program, threads
        self.waiting: dict[int, np.ndarray] = {0: np.ones(threads.count, np.bool_)}
        self.at_barrier: dict[int, tuple[np.ndarray, Instruction]] = {}

    def run(self) -> None:
        for _ in range(MOST_BLOCKS):
            if not self.waiting:
                self._release()
            if not self.waiting:
                return
            number = min(self.waiting)
            self._block(number, self.waiting.pop(number))
        raise Fault(f"{self.program.kernel.name} does not end")

    def _block(self, number: int, threads_of: np.ndarray) -> None:
        threads, block = self.threads, self.program.blocks[number]
        threads.active = None if threads_of.all() else threads_of
        at = 0
        try:
            for at, step in enumerate(block.steps):  # noqa: B007 (for the message)
                step(threads)
            at = len(block.steps)
            self._go_on(number, threads_of, block.last)
        except Fault as fault:
            raise Fault(f"{self._text(number, at)}: {fault}") from None
        except Exception as error:
            raise RuntimeError(self._text(number, at)) from error

    def _text(self, number: int, at: int) -> str:
        kernel = self.program.kernel
        return f"{kernel.name}: {kernel.blocks[number][at].text}"

    def _go_on(self, number: int, threads_of: np.ndarray, last: Instruction | None) -> None:
        """Put the threads that have run a block before the blocks that come next for them."""
        if last is None:
            return self._send(number + 1, threads_of)
        taken = threads_of
        if last.guard is not None:
            found = guarded(self.threads, *last.guard)
            taken = threads_of if found is None else found
        if last.opcode == "bra":
            self._send(self.program.kernel.block_of[last.operands[0]], taken)
        elif last.opcode in ("bar", "barrier"):
            if taken is not threads_of:
                raise Fault("a barrier that not all threads here wait at")
            self._wait(number + 1, taken, last)
        if taken is not threads_of:
            self._send(number + 1, threads_of & ~taken)
        return None

    def _send(self, number: int, threads_of: np.ndarray) -> None:
        if number == len(self.program.blocks) or not threads_of.any():
            return  # past the last instruction there is nothing
        waiting = self.waiting.get(number)
        self.waiting[number] = threads_of if waiting is None else waiting | threads_of

    def _wait(self, number: int, threads_of: np.ndarray, barrier: Instruction) -> None:
        if number in self.at_barrier:
            threads_of = threads_of | self.at_barrier[number][0]
        self.at_barrier[number] = threads_of, barrier

    def _release(self) -> None:
        """All threads that have not ended are at a barrier: a program's at the same one."""
        threads, seen = self.threads, np.zeros(self.threads.programs, np.bool_)
        for number, (waiting, barrier) in self.at_barrier.items():
            programs = np.unique(threads.program[waiting]) - threads.first
            if seen[programs].any():
                raise Fault("threads of one program wait at different barriers")
            seen[programs] = True
            threads.pass_barrier(programs)
            threads.active = waiting
            if "red" in barrier.modifiers:
                self._reduce(barrier)
            self._send(number, waiting)
        self.at_barrier.clear()

    def _reduce(self, barrier: Instruction) -> None:
        """bar.red: all threads of a program learn how many, or whether, their predicates hold."""
        code = Code(barrier, self.program.kernel, self.program.symbols)
        source, threads = code.source(len(barrier.operands) - 1, PRED), self.threads
        yes = np.broadcast_to(source(threads), threads.count) & threads.active
        each = (threads.programs, threads.kernel.num_threads)
        held, there = yes.reshape(each), threads.active.reshape(each)
        mode = code.one_of(*_REDUCTIONS)
        found = {
            "popc": lambda: held.sum(axis=1).astype(np.uint32),
            "and": lambda: (held | ~there).all(axis=1),
            "or": lambda: held.any(axis=1),
        }[mode]()
        target = code.target(0, B32 if mode == "popc" else PRED)
        target(threads, np.repeat(found, threads.kernel.num_threads))
