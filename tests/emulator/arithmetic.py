"""Instructions on numbers, thread by thread: integers, floats, comparisons, bits, conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Code, Step, decodes
from .kinds import BF16, F32, KINDS, PRED, SIGNED, U32, UNSIGNED, Kind
from .ptx import Unknown
from .threads import Threads

_ROUNDING = "rn rz"  # rz only where nothing is rounded: see _cvt


def elementwise(code: Code, function: Callable, kind: Kind | None = None, result=None) -> Step:
    """``function`` of all operands but the first, to the first; subnormals flushed if ``.ftz``."""
    kind = kind or code.kind
    sources, target = code.sources(1, kind), code.target(0, result or kind)
    if "ftz" in code.modifiers and kind is F32:
        return lambda threads: target(
            threads, _flush(function(*(_flush(source(threads)) for source in sources)))
        )
    if len(sources) == 2:
        first, second = sources
        return lambda threads: target(threads, function(first(threads), second(threads)))
    return lambda threads: target(threads, function(*(source(threads) for source in sources)))


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


@decodes("add", modifiers=f"{_ROUNDING} ftz")
def _add(code: Code) -> Step:
    return elementwise(code, np.add)


@decodes("sub", modifiers=f"{_ROUNDING} ftz")
def _sub(code: Code) -> Step:
    return elementwise(code, np.subtract)


@decodes("neg", modifiers="ftz")
def _neg(code: Code) -> Step:
    return elementwise(code, np.negative)


@decodes("abs", modifiers="ftz")
def _abs(code: Code) -> Step:
    return elementwise(code, np.abs)


@decodes("copysign")
def _copysign(code: Code) -> Step:
    return elementwise(code, lambda sign, size: np.copysign(size, sign))


@decodes("min", modifiers="ftz NaN")
def _min(code: Code) -> Step:
    return elementwise(code, _extreme(code, np.minimum, np.fmin))


@decodes("max", modifiers="ftz NaN")
def _max(code: Code) -> Step:
    return elementwise(code, _extreme(code, np.maximum, np.fmax))


def _extreme(code: Code, with_nan: Callable, without_nan: Callable) -> Callable:
    """PTX's min and max pass NaN over unless told otherwise."""
    return without_nan if code.kind.is_float and "NaN" not in code.modifiers else with_nan


@decodes("mul", modifiers=f"{_ROUNDING} ftz lo hi wide")
def _mul(code: Code) -> Step:
    return _multiply(code, lambda product: product)


@decodes("mad", modifiers="lo hi wide rn")
def _mad(code: Code) -> Step:
    return _fma(code) if code.kind.is_float else _multiply(code, np.add)


def _multiply(code: Code, combine: Callable) -> Step:
    """The product of operands 1 and 2, then ``combine`` with those that are left."""
    kind = code.kind
    if kind.is_float:
        return elementwise(code, np.multiply)
    part = code.one_of("lo", "hi", "wide")
    result = _twice(kind) if part == "wide" else kind
    product = {"lo": np.multiply, "hi": high_product, "wide": _wide_product(result)}[part]
    first, second = code.source(1, kind), code.source(2, kind)
    rest, target = code.sources(3, result), code.target(0, result)
    return lambda threads: target(
        threads,
        combine(
            product(first(threads), second(threads)).view(result.dtype),
            *(source(threads) for source in rest),
        ),
    )


def _twice(kind: Kind) -> Kind:
    return KINDS[f"{kind.name[0]}{16 * kind.size}"]


def _wide_product(result: Kind) -> Callable:
    return lambda a, b: a.astype(result.dtype) * b.astype(result.dtype)


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of two integers."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[a.dtype.itemsize * 2]
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    high = _high_unsigned(a.view(np.uint64), b.view(np.uint64))
    if a.dtype.kind == "i":  # a negative number's bits stand for 2^64 more
        high -= np.where(a < 0, b.view(np.uint64), np.uint64(0))
        high -= np.where(b < 0, a.view(np.uint64), np.uint64(0))
    return high.view(a.dtype)


def _high_unsigned(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + (a_low * b_low >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)


@decodes("fma", modifiers="rn ftz relu")
def _fma(code: Code) -> Step:
    """Products of two float32 are exact in float64, so that the sum is rounded as if once."""

    def fused(a, b, c):
        total = a.astype(np.float64) * b + c
        if "relu" in code.modifiers:
            total = np.maximum(total, 0.0)
        return total.astype(a.dtype)

    return elementwise(code, fused)


@decodes("div", modifiers="full approx rn ftz")
def _div(code: Code) -> Step:
    return elementwise(code, np.divide if code.kind.is_float else _quotient)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero; all bits set for a division by zero, which has no set answer."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, ~b, (a - np.fmod(a, safe)) // safe)


@decodes("rem")
def _rem(code: Code) -> Step:
    return elementwise(code, lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b))))


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
    return elementwise(code, lambda x: function(x.astype(np.float64)).astype(x.dtype))


_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


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
        found = compare(first(threads), second(threads))
        # A pair of targets gets the comparison and its opposite.
        for target, value in zip(targets, (found, ~found), strict=False):
            target(threads, join[0](value, third(threads)) if join else value)

    return run


@decodes("and", "or", "xor")
def _logic(code: Code) -> Step:
    return elementwise(code, _LOGIC[code.opcode])


@decodes("not")
def _not(code: Code) -> Step:
    return elementwise(code, np.invert)


_INTEGER_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@decodes("cvt", modifiers=f"{_ROUNDING} rna ftz sat {' '.join(_INTEGER_ROUNDING)}")
def _cvt(code: Code) -> Step:
    to, origin = code.kinds
    if to.name.endswith("x2"):
        return _convert_pair(code, to, origin)
    if to.name == "tf32":
        return elementwise(code, _to_tf32, origin, to)
    sources, target = code.sources(1, origin), code.target(0, to)
    whole = next((_INTEGER_ROUNDING[m] for m in code.modifiers if m in _INTEGER_ROUNDING), None)
    if "rz" in code.modifiers:
        raise Unknown(code.text)
    convert = _conversion(to, origin, whole, "sat" in code.modifiers)
    flush = _flush if "ftz" in code.modifiers else (lambda x: x)
    (source,) = sources
    return lambda threads: target(threads, convert(flush(source(threads))))


def _conversion(to: Kind, origin: Kind, whole: Callable | None, saturate: bool) -> Callable:
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
            return np.clip(x.astype(np.int64), limits.min, limits.max).astype(to.dtype)
        return x.astype(to.dtype)

    return convert


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
    high, low, target = code.source(1, origin), code.source(2, origin), code.target(0, to)

    def run(threads: Threads) -> None:
        pair = np.broadcast_arrays(low(threads), high(threads))
        target(threads, np.stack(pair, axis=1).astype(to.half.dtype))

    return run


@decodes("shl")
def _shl(code: Code) -> Step:
    return _shift(code, np.left_shift)


@decodes("shr")
def _shr(code: Code) -> Step:
    return _shift(code, np.right_shift)


def _shift(code: Code, function: Callable) -> Step:
    """By a distance of 32 bits, of which everything beyond the register's width counts as that."""
    kind = code.kind
    bits = 8 * kind.size
    source, distance, target = code.source(1, kind), code.source(2, U32), code.target(0, kind)
    one = kind.dtype.type(1)

    def run(threads: Threads) -> None:
        value, by = source(threads), np.minimum(distance(threads), bits)
        most = np.minimum(by, bits - 1).astype(kind.dtype)
        shifted = function(value, most)
        target(threads, np.where(by == bits, function(shifted, one), shifted))

    return run
