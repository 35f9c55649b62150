"""Instructions on the bits of a register: fields, counts, permutations."""

from __future__ import annotations

import numpy as np

from .arithmetic import elementwise
from .decode import Code, Step, decodes
from .kinds import B32, U32
from .parse import Unknown

_BYTE = np.uint64(0xFF)


def bit_length(x: np.ndarray) -> np.ndarray:
    """How many bits an unsigned number needs, 0 for 0."""
    x, found = x.astype(np.uint64), np.zeros(x.shape, np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        high = x >> np.uint64(step)
        found += np.where(high > 0, step, 0)
        x = np.where(high > 0, high, x)
    return found + (x > 0)


def count_ones(x: np.ndarray) -> np.ndarray:
    bytes_of = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
    return np.unpackbits(bytes_of, axis=1).sum(axis=1)


def reverse(x: np.ndarray) -> np.ndarray:
    bytes_of = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
    flipped = np.packbits(np.unpackbits(bytes_of, axis=1)[:, ::-1], axis=1)
    return np.ascontiguousarray(flipped).view(x.dtype).reshape(-1)


@decodes("popc")
def _popc(code: Code) -> Step:
    return elementwise(code, count_ones, result=U32)


@decodes("clz")
def _clz(code: Code) -> Step:
    bits = 8 * code.kind.size
    return elementwise(code, lambda x: bits - bit_length(x), result=U32)


@decodes("brev")
def _brev(code: Code) -> Step:
    return elementwise(code, reverse)


@decodes("bfind", modifiers="shiftamt")
def _bfind(code: Code) -> Step:
    """The place of the highest bit that is not the sign's; all ones if there is none."""
    kind = code.kind

    def find(x: np.ndarray) -> np.ndarray:
        x = np.where(x < 0, ~x, x) if kind.is_signed else x
        place = bit_length(x.view(kind.unsigned)) - 1
        if "shiftamt" in code.modifiers:
            place = np.where(place < 0, place, 8 * kind.size - 1 - place)
        return place.astype(np.uint32)

    return elementwise(code, find, result=U32)


@decodes("bfe")
def _bfe(code: Code) -> Step:
    """``length`` bits from bit ``start`` on, with the sign of the last one if the type has one."""
    kind, bits = code.kind, 8 * code.kind.size

    def extract(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = start & np.uint32(255), length & np.uint32(255)
        end = np.minimum(start + length, bits)
        # Up to the top and down again: this drops what lies above and extends the sign.
        up, length = (bits - end).astype(kind.dtype), np.minimum(length, bits)
        down = np.minimum(up + start.astype(kind.dtype), bits - 1).astype(kind.dtype)
        field = (x << np.minimum(up, bits - 1).astype(kind.dtype)) >> down
        beyond = x >> kind.dtype.type(bits - 1) if kind.is_signed else kind.dtype.type(0)
        field = np.where(start >= bits, beyond, field)
        return np.where(length == 0, kind.dtype.type(0), field)

    return elementwise(code, extract, kind, U32)


@decodes("bfi")
def _bfi(code: Code) -> Step:
    """Operand 2 with ``length`` bits from ``start`` on replaced by operand 1's lowest."""
    kind, bits = code.kind, 8 * code.kind.size
    whole = kind.dtype.type((1 << bits) - 1)

    def insert(field: np.ndarray, x: np.ndarray, start: np.ndarray, length: np.ndarray):
        start, length = (
            np.minimum(value & np.uint32(255), bits).astype(kind.dtype) for value in (start, length)
        )
        ones = np.where(length == 0, 0, whole >> np.minimum(bits - length, bits - 1))
        ones = ones.astype(kind.dtype)
        mask = np.where(start == bits, 0, ones << np.minimum(start, bits - 1)).astype(kind.dtype)
        moved = field << np.minimum(start, bits - 1).astype(kind.dtype)
        return (x & ~mask) | (moved & mask)

    return elementwise(code, insert, kind, kind, U32)


@decodes("shf", modifiers="l r wrap clamp")
def _shf(code: Code) -> Step:
    """Two registers as one of 64 bits, shifted; its upper or lower half."""
    left, wrap = code.modifiers[0] == "l", "wrap" in code.modifiers

    def shift(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        by = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
        wide = _joined(low, high)
        return (wide << by >> np.uint64(32) if left else wide >> by).astype(np.uint32)

    return elementwise(code, shift, U32)


def _joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)


@decodes("prmt")
def _prmt(code: Code) -> Step:
    """Four bytes of eight, chosen by a nibble each, whose top bit asks for the byte's sign."""

    def permute(low: np.ndarray, high: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        wide, choice, found = _joined(low, high), chosen.astype(np.uint64), np.zeros(1, np.uint64)
        for i in range(4):
            nibble = choice >> np.uint64(4 * i)
            byte = wide >> ((nibble & np.uint64(7)) * np.uint64(8)) & _BYTE
            sign = np.where(byte & np.uint64(128), _BYTE, np.uint64(0))
            byte = np.where(nibble & np.uint64(8), sign, byte)
            found = found | byte << np.uint64(8 * i)
        return found.astype(np.uint32)

    return elementwise(code, permute, U32)


@decodes("lop3")
def _lop3(code: Code) -> Step:
    """Any function of three bits: its truth table is the last operand."""
    table = int(code.operands[4].rstrip("U"), 0)

    def look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, _) -> np.ndarray:
        found = np.zeros(1, np.uint32)
        for row in range(8):
            if table >> row & 1:
                term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                found = found | term
        return found

    return elementwise(code, look_up, B32)


@decodes("bmsk", modifiers="clamp wrap")
def _bmsk(code: Code) -> Step:
    """Ones in ``length`` bits from ``start`` on."""
    if "wrap" in code.modifiers:
        raise Unknown(code.text)

    def mask(start: np.ndarray, length: np.ndarray) -> np.ndarray:
        one = np.uint64(1)
        start, length = (np.minimum(x, 32).astype(np.uint64) for x in (start, length))
        return (((one << length) - one) << start).astype(np.uint32)

    return elementwise(code, mask)
