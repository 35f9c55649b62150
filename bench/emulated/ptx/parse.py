"""PTX text to a kernel: its parameters, registers, instructions and basic blocks.

Only what Triton emits is understood: one entry a module, no calls but the device assertion's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from .kinds import KINDS, Kind


class Address(NamedTuple):
    """``[base + offset]``, the base a register, a symbol or a number."""

    base: str
    offset: int


class Register(NamedTuple):
    index: int  # in the threads' list of registers
    kind: Kind


class Guard(NamedTuple):
    """``@%p`` or ``@!%p``: only threads whose predicate is ``expected`` take part."""

    index: int
    expected: bool


Operand = str | tuple | Address  # a tuple is a vector {a, b} or a pair a|b


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode.modifiers.kinds operands;`` such as ``@%p1 ld.global.v2.b32 {a, b}, [c]``."""

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    kinds: tuple[Kind, ...]
    operands: tuple[Operand, ...]
    guard: Guard | None


# Instructions that run one after the other; only the last may branch, wait or end.
Block = list[Instruction]


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, Kind]]
    num_threads: int
    registers: dict[str, Register]
    specials: list[str]  # registers that the hardware sets, such as %tid.x
    constants: dict[str, bytes]  # the module's strings
    blocks: list[Block]
    block_of: dict[str, int]  # label -> block


class Unknown(NotImplementedError):
    """An instruction, or a form of one, that the emulator does not know; named in the message."""


ENDS = ("bra", "ret", "exit", "bar", "barrier")
_SPECIAL = re.compile(r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|lanemask_\w+)$")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")


def parse(text: str) -> Kernel:
    """The module's only entry. Raises ValueError if there is none, Unknown for odd parameters."""
    text = re.sub(r"//[^\n]*", "", text)
    entry = _ENTRY.search(text)
    threads = entry and re.search(r"\.reqntid\s+(\d+)", entry[3])
    if not entry or not threads:
        raise ValueError("no .entry with .reqntid in this PTX")
    constants = {
        name: bytes(int(byte) for byte in values.split(","))
        for name, values in re.findall(
            r"\.global[^;\[]*\.b8 ([\w$]+)\[\d+\] = \{([^}]*)\}", text[: entry.start()]
        )
    }
    parameters = [
        (name, KINDS[kind])
        for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)", entry[2].strip())
    ]
    body = _Body(text[entry.end() : _closing(text, entry.end())])
    return Kernel(
        entry[1],
        parameters,
        int(threads[1]),
        body.registers,
        body.specials,
        constants,
        *_blocks(body),
    )


def _closing(text: str, start: int) -> int:
    """Where the brace opened just before ``start`` is closed."""
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError("the entry's body is not closed")


class _Body:
    """A function's statements, in order, with the registers and labels that they name."""

    def __init__(self, text: str) -> None:
        self.registers: dict[str, Register] = {}
        self.specials: list[str] = []
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}  # -> number of the instruction behind it
        self._ranges: dict[str, Kind] = {}  # %r of ``.reg .b32 %r<10>``
        for statement in text.split(";"):
            self._statement(statement.strip())

    def _statement(self, text: str) -> None:
        while True:
            # Scopes, line numbers and labels end without a semicolon.
            prefix = re.match(r"[{}]\s*|\.loc\b[^\n]*\s*|([\w$]+):\s*", text)
            if not prefix:
                break
            if prefix[1]:
                self.labels[prefix[1]] = len(self.instructions)
            text = text[prefix.end() :]
        if text.startswith(".reg"):
            self._declare(text)
        elif text and not text.startswith("."):
            self.instructions.append(self._instruction(re.sub(r"\s+", " ", text)))

    def _declare(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        for name in re.split(r"\s*,\s*", names.strip()):
            many = re.match(r"([^<]+)<\d+>$", name)
            if many:
                self._ranges[many[1]] = KINDS[kind]
            else:
                self._add(name, KINDS[kind])

    def _add(self, name: str, kind: Kind) -> None:
        known = self.registers.setdefault(name, Register(len(self.registers), kind))
        if known.kind.size != kind.size:
            raise Unknown(f"{name} is declared twice, as {known.kind} and {kind}")

    def _name(self, name: str) -> str:
        """Register ``name`` if it is one that is not known yet."""
        if name.startswith("%") and name not in self.registers:
            if _SPECIAL.match(name):
                self.specials.append(name)
                self._add(name, KINDS["u32"])
            else:
                kind = self._ranges.get(name.rstrip("0123456789"))
                if kind is None:
                    raise Unknown(f"register {name}")
                self._add(name, kind)
        return name

    def _instruction(self, text: str) -> Instruction:
        guard, opcode, rest = re.match(r"(?:@(!?[\w%$]+)\s+)?([\w.:]+)\s*(.*)", text).groups()
        if guard:
            register = self.registers[self._name(guard.lstrip("!"))]
            guard = Guard(register.index, not guard.startswith("!"))
        first, *suffixes = opcode.split(".")
        return Instruction(
            text,
            first,
            tuple(suffix for suffix in suffixes if suffix not in KINDS),
            tuple(KINDS[suffix] for suffix in suffixes if suffix in KINDS),
            tuple(self._operand(part) for part in _split(rest)),
            guard or None,
        )

    def _operand(self, text: str) -> Operand:
        if text.startswith(("{", "(")):
            return tuple(self._operand(part) for part in _split(text[1:-1]))
        if text.startswith("["):
            base, offset = re.match(r"\[\s*([\w.$%]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text).groups()
            return Address(self._name(base), int(offset or "0", 0))
        if "|" in text:
            return tuple(self._name(part.strip()) for part in text.split("|"))
        self._name(text.lstrip("!"))
        return text


def _split(text: str) -> list[str]:
    """Operands, at the commas outside braces and brackets."""
    found = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|\([^)]*\)|[^,{[(])+", text)
    return [part.strip() for part in found]


def _blocks(body: _Body) -> tuple[list[Block], dict[str, int]]:
    """Cut before every label that is branched to and behind everything that may not go on."""
    targets = {i.operands[0] for i in body.instructions if i.opcode == "bra"}
    starts = {0} | {body.labels[label] for label in targets}
    starts |= {n + 1 for n, i in enumerate(body.instructions) if ends(i)}
    number = {start: n for n, start in enumerate(sorted(starts))}
    blocks: list[Block] = [[] for _ in number]
    current = blocks[0]
    for n, instruction in enumerate(body.instructions):
        current = blocks[number[n]] if n in number else current
        current.append(instruction)
    return blocks, {label: number[body.labels[label]] for label in targets}


def ends(instruction: Instruction) -> bool:
    """Whether a block ends with it. ``bar.warp.sync`` is none: warps run in lock-step here."""
    return instruction.opcode in ENDS and "warp" not in instruction.modifiers
