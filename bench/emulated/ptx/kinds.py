"""PTX's types: the bits that a register holds, and the numpy values they stand for."""

from __future__ import annotations

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {2: np.float16, 4: np.float32, 8: np.float64}


class Kind:
    """A type of ``size`` bytes whose bits are the values of a numpy dtype."""

    def __init__(self, name: str, size: int, dtype) -> None:
        self.name, self.size = name, size
        self.dtype, self.unsigned = np.dtype(dtype), UNSIGNED[size]
        self.is_float, self.is_signed = self.dtype.kind == "f", self.dtype.kind == "i"

    def __repr__(self) -> str:
        return self.name

    def of(self, number: int) -> np.ndarray:
        """Its lowest bits, [1]."""
        return np.array([number & ((1 << 8 * self.size) - 1)], self.unsigned)

    def values(self, bits: np.ndarray) -> np.ndarray:
        return bits.view(self.dtype)

    def bits(self, values: np.ndarray) -> np.ndarray:
        return values.astype(self.dtype, copy=False).view(self.unsigned)


class Bfloat16(Kind):
    """Computed with as float32, which holds every bfloat16; rounded to nearest even."""

    def __init__(self) -> None:
        super().__init__("bf16", 2, np.float32)

    def values(self, bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def bits(self, values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32, copy=False)
        wide = values.view(np.uint32).astype(np.uint64)
        wide += np.uint64(0x7FFF) + ((wide >> np.uint64(16)) & np.uint64(1))
        rounded = (wide >> np.uint64(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


class Packed(Kind):
    """Two values of a 16-bit type in 32 bits: values are [threads, 2]."""

    def __init__(self, half: Kind) -> None:
        super().__init__(half.name + "x2", 4, np.uint32)
        self.half, self.is_float, self.is_signed = half, half.is_float, half.is_signed

    def values(self, bits: np.ndarray) -> np.ndarray:
        return self.half.values(np.ascontiguousarray(bits).view(np.uint16)).reshape(-1, 2)

    def bits(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.half.bits(values)).view(np.uint32).reshape(-1)


class Predicate(Kind):
    """One truth value, held as a numpy bool."""

    def __init__(self) -> None:
        super().__init__("pred", 1, np.bool_)
        self.unsigned = np.bool_


def _kinds() -> dict[str, Kind]:
    found: list[Kind] = [Predicate(), Bfloat16()]
    for size in UNSIGNED:
        bits = 8 * size
        found += [Kind(f"{letter}{bits}", size, UNSIGNED[size]) for letter in "bu"]
        found.append(Kind(f"s{bits}", size, SIGNED[size]))
        if size in FLOAT:
            found.append(Kind(f"f{bits}", size, FLOAT[size]))
    by_name = {kind.name: kind for kind in found}
    by_name["tf32"] = Kind("tf32", 4, np.float32)
    halves = ("f16", "bf16", "s16", "u16")
    return by_name | {half + "x2": Packed(by_name[half]) for half in halves}


KINDS = _kinds()
PRED, BF16 = KINDS["pred"], KINDS["bf16"]
B32, U32, U64, S32, F32 = (KINDS[name] for name in ("b32", "u32", "u64", "s32", "f32"))


def immediate(text: str, kind: Kind) -> np.ndarray:
    """The bits of a literal, [1]: ``-5``, ``0x10``, ``0f3F800000`` and ``0d...`` (a float's bits).

    Raises ValueError if the text is no literal.
    """
    if kind is PRED:
        return np.array([{"true": 1, "false": 0}.get(text) or int(text, 0)], dtype=np.bool_)
    return kind.of(int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0))
