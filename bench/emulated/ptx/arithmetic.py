"""Instructions on numbers, thread by thread: integers, floats, comparisons, bits, conversions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat

import numpy as np

from .decode import Code, Step, decodes
from .kinds import BF16, KINDS, PRED, SIGNED, U32, UNSIGNED, Kind
from .parse import Unknown
from .threads import Threads

_ROUNDING = "rn rz"  # rz only where nothing is rounded: see _cvt


def elementwise(code: Code, function: Callable, *kinds: Kind, result: Kind | None = None) -> Step:
    """``function`` of all operands but the first, to the first; subnormals flushed if ``.ftz``.

    kinds: of the operands, the last for all that are left; the instruction's own if none is given.
    result: of the first; as the second's by default.
    """
    kinds = kinds or (code.kind,)
    each = zip(code.operands[1:], chain(kinds, repeat(kinds[-1])), strict=False)
    sources = [code.source(operand, kind) for operand, kind in each]
    target = code.target(0, result or kinds[0])
    if "ftz" in code.modifiers:
        return lambda threads: target(
            threads, _flush(function(*(_flush(source(threads)) for source in sources)))
        )
    return lambda threads: target(threads, function(*[source(threads) for source in sources]))


def _flush(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


_NAN = np.uint32(0x7FFFFFFF).view(np.float32)


def _one_nan(function: Callable) -> Callable:
    """Of arithmetic in float32 every NaN has the same bits on a device. numpy's has those of the
    first operand that is one, and lanes that add up the same numbers in other orders would differ.
    """

    def computed(*values: np.ndarray) -> np.ndarray:
        found = function(*values)
        if found.dtype == np.float32 and (nans := found != found).any():
            return np.where(nans, _NAN, found)
        return found

    return computed


def _each(functions: dict[str, Callable], modifiers: str = "") -> None:
    """Decoders of opcodes that a function of the operands stands for."""
    decodes(*functions, modifiers=modifiers)(lambda code: elementwise(code, functions[code.opcode]))


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_each({"add": _one_nan(np.add), "sub": _one_nan(np.subtract)}, f"{_ROUNDING} ftz")
_each({"neg": np.negative, "abs": np.abs}, "ftz")
_each({"copysign": lambda sign, size: np.copysign(size, sign), "not": np.invert, **_LOGIC})


@decodes("min", "max", modifiers="ftz NaN")
def _extreme(code: Code) -> Step:
    return elementwise(code, _one_nan(extreme(code, code.opcode)))


def extreme(code: Code, name: str) -> np.ufunc:
    """PTX's min and max pass NaN over unless told otherwise."""
    if code.kind.is_float and "NaN" not in code.modifiers:
        return {"min": np.fmin, "max": np.fmax}[name]
    return {"min": np.minimum, "max": np.maximum}[name]


@decodes("mul", modifiers=f"{_ROUNDING} ftz lo hi wide")
@decodes("mad", modifiers="lo hi wide rn")
def _multiply(code: Code) -> Step:
    """The product of operands 1 and 2, and its sum with operand 3 if there is one."""
    kind = code.kind
    if kind.is_float:
        return _fma(code) if code.opcode == "mad" else elementwise(code, _one_nan(np.multiply))
    part = code.one_of("lo", "hi", "wide")
    result = KINDS[f"{kind.name[0]}{16 * kind.size}"] if part == "wide" else kind

    def multiply(a: np.ndarray, b: np.ndarray, *addend: np.ndarray) -> np.ndarray:
        if part == "hi":
            product = high_product(a, b)
        else:
            product = a.astype(result.dtype) * b.astype(result.dtype)
        return product + addend[0] if addend else product

    return elementwise(code, multiply, kind, kind, result, result=result)


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of two integers."""
    size = a.dtype.itemsize
    # Only Python's own integers hold the whole product of two of 64 bits.
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * size] if size < 8 else object
    return (a.astype(wide) * b.astype(wide) >> 8 * size).astype(a.dtype)


@decodes("fma", modifiers="rn ftz relu")
def _fma(code: Code) -> Step:
    """Products of two float32 are exact in float64, so that the sum is rounded as if once."""

    def fused(a, b, c):
        total = a.astype(np.float64) * b + c
        if "relu" in code.modifiers:
            total = np.maximum(total, 0.0)
        return total.astype(a.dtype)

    return elementwise(code, _one_nan(fused))


@decodes("div", modifiers="full approx rn ftz")
def _div(code: Code) -> Step:
    return elementwise(code, _one_nan(np.divide) if code.kind.is_float else _quotient)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero; all bits set for a division by zero, which has no set answer."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, ~b, (a - np.fmod(a, safe)) // safe)


_each({"rem": lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b)))})


_FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "rcp": lambda x: 1.0 / x,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@decodes(*_FUNCTIONS, modifiers="approx rn ftz full")
def _function(code: Code) -> Step:
    """Exact where the hardware approximates: tolerances have to leave room for its 2^-22."""
    function = _FUNCTIONS[code.opcode]
    return elementwise(code, _one_nan(lambda x: function(x.astype(np.float64)).astype(x.dtype)))


_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, kind: Kind) -> Callable:
    """Comparisons of floats are false for NaN, those whose name ends with u are true."""
    if not kind.is_float:
        return _COMPARISONS[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    compare = _COMPARISONS[name.removesuffix("u")]
    if name.endswith("u"):
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return compare if name != "ne" else lambda a, b: (a < b) | (a > b)


@decodes(
    "setp",
    modifiers="eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz",
)
def _setp(code: Code) -> Step:
    kind = code.kind
    if kind is PRED or kind.name.endswith("x2"):
        raise Unknown(code.text)
    compare = _comparison(code.modifiers[0], kind)
    first, second = code.source(1, kind), code.source(2, kind)
    targets = [code.target(part, PRED) for part in code.vector(0)]
    join = [_LOGIC[m] for m in code.modifiers[1:] if m in _LOGIC]
    third = code.source(3, PRED) if join else None

    def run(threads: Threads) -> None:
        pair = first(threads), second(threads)
        found = compare(*(map(_flush, pair) if "ftz" in code.modifiers else pair))
        # A pair of targets gets the comparison and its opposite.
        for target, value in zip(targets, (found, ~found), strict=False):
            target(threads, join[0](value, third(threads)) if join else value)

    return run


_INTEGER_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@decodes("cvt", modifiers=f"{_ROUNDING} rna ftz sat {' '.join(_INTEGER_ROUNDING)}")
def _cvt(code: Code) -> Step:
    to, origin = code.kinds
    if to.name.endswith("x2"):
        return _convert_pair(code, to, origin)
    if to.name == "tf32":
        return elementwise(code, _to_tf32, origin, result=to)
    if "rz" in code.modifiers:
        raise Unknown(code.text)
    whole = next((_INTEGER_ROUNDING[m] for m in code.modifiers if m in _INTEGER_ROUNDING), None)
    saturate = "sat" in code.modifiers

    def convert(x: np.ndarray) -> np.ndarray:
        if whole is not None and origin.is_float:
            x = whole(x)
        if to.is_float:
            x = x.astype(to.dtype)
            return np.clip(np.nan_to_num(x), 0, 1) if saturate else x
        if origin.is_float:
            return _to_integer(x, to.dtype)
        if saturate:
            limits = np.iinfo(to.dtype)
            x = np.clip(x.astype(np.int64), limits.min, limits.max)
        return x.astype(to.dtype)

    return elementwise(code, convert, origin, result=to)


def _to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Out of range: the nearest end of it; NaN: 0."""
    limits = np.iinfo(dtype)
    # The largest float that is still in range: int64's own end is none.
    top = np.nextafter(float(limits.max) + 1, 0) if limits.bits == 64 else float(limits.max)
    inside = np.clip(np.nan_to_num(x.astype(np.float64)), float(limits.min), top).astype(dtype)
    return np.where(x >= float(limits.max), dtype.type(limits.max), inside)


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits of fraction, halves away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _convert_pair(code: Code, to: Kind, origin: Kind) -> Step:
    """cvt.rn.bf16x2.f32 target, high, low"""
    if "rz" in code.modifiers or to.half not in (BF16, KINDS["f16"]):
        raise Unknown(code.text)

    def pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return np.stack(np.broadcast_arrays(low, high), axis=1).astype(to.half.dtype)

    return elementwise(code, pair, origin, result=to)


@decodes("shl", "shr")
def _shift(code: Code) -> Step:
    """By a distance of 32 bits, of which everything beyond the register's width counts as that."""
    kind, bits = code.kind, 8 * code.kind.size
    move, one = {"shl": np.left_shift, "shr": np.right_shift}[code.opcode], kind.dtype.type(1)

    def shift(value: np.ndarray, distance: np.ndarray) -> np.ndarray:
        by = np.minimum(distance, bits)
        shifted = move(value, np.minimum(by, bits - 1).astype(kind.dtype))
        return np.where(by == bits, move(shifted, one), shifted)

    return elementwise(code, shift, kind, U32)
