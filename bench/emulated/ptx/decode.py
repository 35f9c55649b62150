"""From an instruction to a function on threads, made once for each instruction of a kernel.

Decoders register themselves by opcode, with the modifiers that they know: anything else raises
``Unknown``, so that nothing is run half understood.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .kinds import PRED, SIGNED, U32, U64, UNSIGNED, Kind, immediate
from .memory import Watched
from .parse import Address, Instruction, Kernel, Operand, Unknown
from .threads import Threads

Step = Callable[[Threads], None]
Source = Callable[[Threads], np.ndarray]  # values, [T] or [1]
Target = Callable[[Threads, np.ndarray], None]

_DECODERS: dict[str, tuple[Callable[[Code], Step], frozenset[str]]] = {}


def decodes(*opcodes: str, modifiers: str = ""):
    """Register a decoder for these opcodes and (space separated) modifiers."""

    def register(decoder):
        for opcode in opcodes:
            assert opcode not in _DECODERS, opcode
            _DECODERS[opcode] = decoder, frozenset(modifiers.split())
        return decoder

    return register


def decode(instruction: Instruction, kernel: Kernel, symbols: dict[str, int]) -> Step:
    """The function that carries ``instruction`` out. Raises Unknown with its text."""
    decoder, known = _DECODERS.get(instruction.opcode, (None, frozenset()))
    unknown = [m for m in instruction.modifiers if m not in known and m[:4] not in ("L1::", "L2::")]
    if decoder is None or unknown:
        raise Unknown(instruction.text)
    try:
        step = decoder(Code(instruction, kernel, symbols))
    except (KeyError, IndexError, ValueError) as error:
        raise Unknown(instruction.text) from error
    return step if instruction.guard is None else _guarded(step, *instruction.guard)


def _guarded(step: Step, index: int, expected: bool) -> Step:
    def run(threads: Threads) -> None:
        outside = threads.active
        threads.active = guarded(threads, index, expected)
        if threads.active is None or threads.active.any():
            step(threads)
        threads.active = outside

    return run


def guarded(threads: Threads, index: int, expected: bool) -> np.ndarray | None:
    """The active threads whose predicate is as expected; None for all."""
    taken = threads.registers[index]
    taken = taken if expected else ~taken
    if threads.active is not None:
        taken = taken & threads.active
    return None if taken.all() else taken


class Code:
    """An instruction in its kernel: what decoders read their operands through."""

    def __init__(self, instruction: Instruction, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.text, self.opcode = instruction.text, instruction.opcode
        self.modifiers, self.kinds = instruction.modifiers, instruction.kinds
        self.operands = instruction.operands
        self._kernel, self._symbols = kernel, symbols

    @property
    def kind(self) -> Kind:
        """The type of an instruction that has only one."""
        (kind,) = self.kinds
        return kind

    def one_of(self, *modifiers: str) -> str:
        """The modifier that the instruction has of these."""
        found = [m for m in self.modifiers if m in modifiers]
        if len(found) != 1:
            raise Unknown(self.text)
        return found[0]

    def source(self, operand: int | Operand, kind: Kind) -> Source:
        """What reads an operand (or the operand of that number) as values of ``kind``."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if kind is PRED and operand.startswith("!"):
            inner = self.source(operand[1:], kind)
            return lambda threads: ~inner(threads)
        register = self._kernel.registers.get(operand)
        if register is None:
            constant = kind.values(self._constant(operand, kind))
            return lambda threads: constant
        index, unsigned, values = register.index, kind.unsigned, kind.values
        if kind is PRED:
            return lambda threads: threads.registers[index]
        if register.kind.size == kind.size:
            return lambda threads: values(threads.registers[index])
        return lambda threads: values(threads.registers[index].astype(unsigned))

    def _constant(self, text: str, kind: Kind) -> np.ndarray:
        if text in self._symbols:
            return np.array([self._symbols[text]], kind.unsigned)
        return np.array([32], kind.unsigned) if text == "WARP_SZ" else immediate(text, kind)

    def target(self, operand: int | Operand, kind: Kind) -> Target:
        """What writes values of ``kind`` to an operand; a wider register is sign-extended."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if operand == "_":
            return lambda threads, values: None
        register = self._kernel.registers[operand]
        index, bits = register.index, kind.bits
        if register.kind.size == kind.size:
            return lambda threads, values: threads.write(index, bits(values))
        if register.kind.size < kind.size:
            raise Unknown(self.text)
        narrow = (SIGNED if kind.is_signed else UNSIGNED)[kind.size]
        wide = (SIGNED if kind.is_signed else UNSIGNED)[register.kind.size]
        unsigned = UNSIGNED[register.kind.size]
        return lambda threads, values: threads.write(
            index, bits(values).view(narrow).astype(wide).view(unsigned)
        )

    def vector(self, operand: int) -> tuple[str, ...]:
        """The parts of a vector operand, or the operand alone."""
        parts = self.operands[operand]
        return parts if isinstance(parts, tuple) else (parts,)

    def address(self, operand: int, kind: Kind = U64) -> Source:
        """What computes ``[base + offset]``: ``U64`` for global memory, ``U32`` for shared."""
        place = self.operands[operand]
        if not isinstance(place, Address):
            raise Unknown(self.text)
        base = self.source(place.base, kind)
        offset = np.array([place.offset]).astype(kind.dtype)
        return (lambda threads: base(threads) + offset) if place.offset else base

    def memory(self, operand: int) -> tuple[Callable[[Threads], Watched], Source]:
        """Of an access: the memory, global or shared, and what computes the address in it."""
        if self.one_of("global", "shared", "shared::cta") == "global":
            return (lambda threads: threads.memory), self.address(operand)
        return (lambda threads: threads.shared), self.shared_address(operand)

    def shared_address(self, operand: int) -> Source:
        return self.address(operand, U32)


def at(values: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Values, [T] or [1], of the threads ``which``."""
    return values[which] if len(values) > 1 else np.repeat(values, len(which))
