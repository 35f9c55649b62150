"""Single instructions against what Python's integers and numpy's floats say."""

from __future__ import annotations

import numpy as np
import pytest

from bench.emulated.ptx.kinds import BF16
from bench.emulated.ptx.memory import Fault
from bench.emulated.ptx.parse import Unknown

from .assembly import apply, run

LANES = np.arange(32)


def integers(bits: int, seed: int = 0) -> np.ndarray:
    """Random ones, with both ends, zero and one among them."""
    found = np.random.default_rng(seed).integers(0, 1 << bits, 32, np.uint64)
    found[:4] = 0, 1, (1 << bits) - 1, 1 << (bits - 1)
    return np.roll(found, seed).astype(f"u{bits // 8}")


def floats(seed: int = 0, low: float = -10, high: float = 10) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, 32).astype(np.float32)


def signed(value, bits: int) -> int:
    value = int(value)
    return value - (1 << bits) if value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    """a / b towards zero; by zero, all ones."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def remainder(a: int, b: int) -> int:
    return a - b * quotient(a, b) if b else a


INTEGER = {  # of a type with that many bits, and of operands of it
    "add.s": lambda bits, a, b: a + b,
    "sub.s": lambda bits, a, b: a - b,
    "mul.lo.s": lambda bits, a, b: a * b,
    "mul.hi.s": lambda bits, a, b: a * b >> bits,
    "mul.hi.u": lambda bits, a, b: a * b >> bits,
    "min.s": lambda bits, a, b: min(a, b),
    "max.u": lambda bits, a, b: max(a, b),
    "div.s": lambda bits, a, b: quotient(a, b),
    "rem.s": lambda bits, a, b: remainder(a, b),
    "div.u": lambda bits, a, b: quotient(a, b),
    "rem.u": lambda bits, a, b: remainder(a, b),
    "and.b": lambda bits, a, b: a & b,
    "or.b": lambda bits, a, b: a | b,
    "xor.b": lambda bits, a, b: a ^ b,
    "brev.b": lambda bits, a: int(f"{a:0{bits}b}"[::-1], 2),
    "popc.b": lambda bits, a: a.bit_count(),
    "clz.b": lambda bits, a: bits - a.bit_length(),
    "bfind.u": lambda bits, a: a.bit_length() - 1,
    "bfind.s": lambda bits, a: (a ^ (a >> bits)).bit_length() - 1,
}
COUNTS = ("popc.b", "clz.b", "bfind.u", "bfind.s")  # of 32 bits, whatever they count in


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("opcode", INTEGER)
def test_integers(opcode, bits):
    function, size = INTEGER[opcode], 4 if opcode in COUNTS else bits // 8
    operands = [integers(bits, seed) for seed in range(function.__code__.co_argcount - 1)]
    places = ", ".join(f"${i}" for i in range(len(operands) + 1))
    found = apply(f"{opcode}{bits} {places};", *operands, size=size)
    read = (lambda x: signed(x, bits)) if ".s" in opcode else int
    for *values, got in zip(*operands, found, strict=True):
        assert int(got) == function(bits, *map(read, values)) % (1 << 8 * size), values


def inserted(start: int, length: int):
    """``length`` bits from ``start`` on of b, replaced by the lowest of a."""
    mask = ((1 << length) - 1) << start
    return lambda a, b: b & ~mask | a << start & mask


def permuted(a: int, b: int) -> int:
    octets = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    sign = 255 if octets[4] & 128 else 0  # nibble C: the sign of byte 4
    return int.from_bytes([octets[4], sign, octets[1], octets[7]], "little")


WORDS = {  # of operands of 32 bits
    "prmt.b32 $0, $1, $2, 0x71C4": permuted,
    "lop3.b32 $0, $1, $2, $3, 0xE8": lambda a, b, c: a & b | a & c | b & c,
    "shf.l.wrap.b32 $0, $1, $2, $3": lambda a, b, by: (b << 32 | a) << by % 32 >> 32,
    "shf.r.wrap.b32 $0, $1, $2, $3": lambda a, b, by: (b << 32 | a) >> by % 32,
    "shf.r.clamp.b32 $0, $1, $2, $3": lambda a, b, by: (b << 32 | a) >> min(by, 32),
} | {
    f"bfi.b32 $0, $1, $2, {start}, {length}": inserted(start, length)
    for start, length in ((0, 8), (8, 8), (28, 9), (0, 32), (5, 0), (40, 3))
}


@pytest.mark.parametrize("text", WORDS)
def test_words(text):
    operands = [integers(32, seed) for seed in range(WORDS[text].__code__.co_argcount)]
    found = apply(f"{text};", *operands)
    for *values, got in zip(*operands, found, strict=True):
        assert int(got) == WORDS[text](*map(int, values)) % (1 << 32), values


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("opcode", ["shl.b", "shr.u", "shr.s"])
def test_shifts_by_more_than_the_width(opcode, bits):
    a, by = integers(bits), (LANES * 3).astype(np.uint32)
    found = apply(f"{opcode}{bits} $0, $1, $2;", a, by, size=bits // 8)
    for x, n, got in zip(a, by, found, strict=True):
        x = signed(x, bits) if opcode == "shr.s" else int(x)
        expected = x << int(n) if opcode == "shl.b" else x >> int(n)
        assert int(got) == expected % (1 << bits), (hex(x), n)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize(("start", "length"), [(0, 8), (5, 27), (31, 4), (3, 0), (0, 32), (20, 60)])
def test_fields(kind, start, length):
    bits = int(kind[1:])
    a = integers(bits)
    found = apply(f"bfe.{kind} $0, $1, {start}, {length};", a, size=bits // 8)
    for x, got in zip(a, found, strict=True):
        x = signed(x, bits) if kind[0] == "s" else int(x)
        field = x >> start & ((1 << min(length, bits - start)) - 1)
        top = x >> min(start + length - 1, bits - 1) & 1
        if kind[0] == "s" and length and top:
            field -= 1 << min(length, bits - start)
        assert int(got) == field % (1 << bits), hex(x)


def test_wide_products_and_sums():
    a, b, c = integers(32), integers(32, seed=1), integers(64, seed=2)
    found = apply("mad.wide.s32 $0, $1, $2, $3;", a, b, c, size=8)
    for x, y, z, got in zip(a, b, c, found, strict=True):
        assert int(got) == (signed(x, 32) * signed(y, 32) + int(z)) % (1 << 64), (hex(x), hex(y))


def test_pairs_of_sixteen_bits_do_not_carry_over():
    a, b = integers(32), integers(32, seed=1)
    found = apply("add.s16x2 $0, $1, $2;", a, b)
    assert (found.view(np.uint16) == a.view(np.uint16) + b.view(np.uint16)).all()


FLOAT = {
    "add.f32": lambda a, b: a + b,
    "mul.rn.f32": lambda a, b: a * b,
    "div.full.f32": lambda a, b: a / b,
    "copysign.f32": lambda a, b: np.copysign(b, a),
    "max.f32": np.fmax,
    "min.NaN.f32": np.minimum,
}


@pytest.mark.parametrize("opcode", FLOAT)
def test_floats(opcode):
    a, b = floats(), floats(seed=1)
    a[0] = b[1] = np.nan
    found = apply(f"{opcode} $0, $1, $2;", a, b).view(np.float32)
    np.testing.assert_array_equal(found, FLOAT[opcode](a, b))


def test_a_fused_product_and_sum_is_rounded_once():
    a, c = floats(), floats(seed=1)
    found = apply("fma.rn.f32 $0, $1, $1, $2;", a, c).view(np.float32)
    exact = a.astype(np.float64) ** 2 + c
    assert (found == exact.astype(np.float32)).all()
    assert (found != a * a + c).any()


def test_subnormal_numbers_are_flushed_where_asked():
    tiny = np.full(32, 1e-40, np.float32)
    one = np.ones(32, np.float32)
    assert (apply("mul.ftz.f32 $0, $1, $2;", tiny, one) == 0).all()
    assert (apply("mul.f32 $0, $1, $2;", tiny, one).view(np.float32) == tiny).all()
    for ftz, positive in ((".ftz", 0), ("", 1)):
        text = f"setp.gt{ftz}.f32 %p1, $1, 0f00000000; selp.b32 $0, 1, 0, %p1;"
        assert (apply(text, tiny) == positive).all()


@pytest.mark.parametrize(
    ("opcode", "function"),
    [("ex2.approx.ftz.f32", np.exp2), ("lg2.approx.f32", np.log2), ("rcp.rn.f32", np.reciprocal)],
)
def test_functions(opcode, function):
    a = floats(low=0.1)
    found = apply(f"{opcode} $0, $1;", a).view(np.float32)
    np.testing.assert_allclose(found, function(a.astype(np.float64)), rtol=2.0**-24)


@pytest.mark.parametrize(
    ("opcode", "of_nan", "function"),
    [
        ("setp.lt.f32", False, np.less),
        ("setp.geu.f32", True, np.greater_equal),
        ("setp.ne.f32", False, np.not_equal),
        ("setp.neu.f32", True, np.not_equal),
        ("setp.num.f32", False, lambda a, b: a == a),
        ("setp.nan.f32", True, lambda a, b: a != a),
    ],
)
def test_comparisons_with_nan(opcode, of_nan, function):
    a, b = np.round(floats()), np.round(floats(seed=1))
    b[:8] = a[:8]
    expected = function(a, b)
    a[0], expected[0] = np.nan, of_nan
    found = apply(f"{opcode} %p1|%p2, $1, $2; selp.b32 $0, 1, 0, %p1;", a, b)
    assert (found == expected).all()
    opposite = apply(f"{opcode} %p1|%p2, $1, $2; selp.b32 $0, 1, 0, %p2;", a, b)
    assert (opposite == ~expected).all()


def test_a_comparison_joined_with_a_predicate():
    a, b = integers(32), integers(32, seed=1)
    text = "setp.lt.u32 %p1, $1, 100; setp.gt.or.s32 %p2, $1, $2, !%p1; selp.b32 $0, 7, 9, %p2;"
    expected = (a.view(np.int32) > b.view(np.int32)) | ~(a < 100)
    assert (apply(text, a, b) == np.where(expected, 7, 9)).all()


CONVERSIONS = [
    ("cvt.rzi.s32.f32", [2.7, -2.7, 3e9, -3e9, np.nan], [2, -2, 2**31 - 1, -(2**31), 0]),
    ("cvt.rni.u32.f32", [2.5, 3.5, -1.0, 5e9, 0.0], [2, 4, 0, 2**32 - 1, 0]),
    ("cvt.rmi.f32.f32", [2.7, -2.7, 0.0, -0.5, 1e9], [2.0, -3.0, 0.0, -1.0, 1e9]),
]


@pytest.mark.parametrize(("opcode", "values", "expected"), CONVERSIONS)
def test_conversions(opcode, values, expected):
    a = np.resize(np.array(values, np.float32), 32)
    found = apply(f"{opcode} $0, $1;", a)[: len(values)]
    kind = {"s32": np.int32, "u32": np.uint32, "f32": np.float32}[opcode.split(".")[2]]
    assert found.view(kind).tolist() == expected


def test_conversions_of_integers_keep_or_cut_the_sign():
    a = integers(32)
    wide = apply("cvt.s64.s32 $0, $1;", a, size=8)
    assert (wide == a.view(np.int32).astype(np.int64).view(np.uint64)).all()
    byte = apply("cvt.u16.u32 %rs1, $1; cvt.s32.s8 $0, %rs1;", a)
    assert (byte == a.astype(np.int8).astype(np.int32).view(np.uint32)).all()


@pytest.mark.parametrize(
    "instruction",
    ["add.f32 $0, $1, $2", "sub.f32 $0, $1, $2", "mul.f32 $0, $1, $2", "div.rn.f32 $0, $1, $2",
     "fma.rn.f32 $0, $1, $2, $1", "max.NaN.f32 $0, $1, $2", "sqrt.rn.f32 $0, $1"],
)  # fmt: skip
def test_arithmetic_gives_one_nan_whichever_it_is_given(instruction):
    """Lanes that sum up in other orders have the same bits, as on a device."""
    one, two = (np.full(32, bits, np.uint32) for bits in (0x7FC00001, 0xFFC00002))
    for a, b in ((one, two), (two, one)):
        found = apply(f"{instruction};", a.view(np.float32), b.view(np.float32))
        assert (found == 0x7FFFFFFF).all()


def test_bfloat16_rounds_to_the_nearest_even():
    a = np.resize(np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001], np.uint32), 32)
    found = apply("cvt.rn.bf16x2.f32 $0, $1, $1;", a.view(np.float32))
    halves = found.view(np.uint16)[:8].reshape(4, 2)
    assert (halves[:, 0] == halves[:, 1]).all()
    assert halves[:, 0].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7FFF]
    back = apply("mov.b32 {%rs1, %rs2}, $1; cvt.f32.bf16 $0, %rs1;", found).view(np.float32)
    np.testing.assert_array_equal(back, BF16.values(found.view(np.uint16)[::2]))


def test_registers_are_taken_apart_and_put_together():
    a, b = integers(32), integers(32, seed=1)
    both = apply("mov.b64 $0, {$1, $2};", a, b, size=8)
    assert (both == (b.astype(np.uint64) << np.uint64(32) | a)).all()
    high = apply("mov.b64 {%r20, %r21}, $1; mov.b32 $0, %r21;", both)
    assert (high == b).all()


SHUFFLES = {
    "bfly.b32 $0, $1, 4, 31": LANES ^ 4,
    "idx.b32 $0, $1, 5, 31": np.full(32, 5),
    "idx.b32 $0, $1, 1, 6175": LANES // 8 * 8 + 1,  # in segments of 8: 31 | (32 - 8) << 8
    "up.b32 $0, $1, 3, 0": np.where(LANES < 3, LANES, LANES - 3),
    "down.b32 $0, $1, 3, 31": np.where(LANES > 28, LANES, LANES + 3),
}


@pytest.mark.parametrize("text", SHUFFLES)
def test_shuffles(text):
    a = integers(32)
    assert (apply(f"shfl.sync.{text}, -1;", a) == a[SHUFFLES[text]]).all()


REDUCTIONS = {
    "add.s32": np.add,
    "max.s32": np.maximum,
    "min.u32": np.minimum,
    "or.b32": np.bitwise_or,
}


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reductions_over_a_warp(kind):
    a = integers(32)
    values = a.view(np.int32) if ".s" in kind else a
    expected = int(REDUCTIONS[kind].reduce(values)) & 0xFFFFFFFF
    assert (apply(f"redux.sync.{kind} $0, $1, -1;", a) == expected).all()


def test_reductions_over_some_of_a_warp():
    a = integers(32)
    text = "setp.lt.u32 %p1, %r1, 4; mov.u32 $0, 0; @%p1 redux.sync.max.u32 $0, $1, 15;"
    assert (apply(text, a) == np.where(LANES < 4, a[:4].max(), 0)).all()


def test_votes():
    a = integers(32)
    even = int(sum(1 << i for i in LANES if a[i] % 2 == 0))
    odd = "and.b32 %r20, $1, 1; setp.eq.u32 %p1, %r20, 0;"
    assert (apply(f"{odd} vote.sync.ballot.b32 $0, %p1, -1;", a) == even).all()
    text = f"{odd} vote.sync.any.pred %p2, %p1, -1; selp.b32 $0, 1, 0, %p2;"
    assert (apply(text, a) == 1).all()
    assert (apply(text.replace(".any", ".all"), a) == 0).all()


def test_matches():
    a = (LANES % 3).astype(np.uint32)
    expected = [sum(1 << i for i in LANES if a[i] == x) for x in a]
    assert apply("match.any.sync.b32 $0, $1, -1;", a).tolist() == expected
    assert (apply("match.all.sync.b32 $0|%p1, $1, -1;", a) == 0).all()
    assert (apply("match.all.sync.b32 $0|%p1, $1, -1;", a * 0) == 0xFFFFFFFF).all()


def test_a_barrier_that_counts():
    body = """
    setp.lt.u32 %p1, %r1, 70;
    bar.red.popc.u32 %r3, 0, %p1;
    bar.red.and.pred %p2, 0, %p1;
    selp.b32 %r4, 1000, 0, %p2;
    add.s32 %r3, %r3, %r4;
    mad.wide.u32 %rd3, %r1, 4, %rd2;
    st.global.b32 [%rd3], %r3;
    """
    assert (run(body, threads=128) == 70).all()


def test_threads_that_part_come_together_again():
    """A loop of as many rounds as the thread's number, then a shuffle of all of them."""
    body = """
    mov.u32 %r3, 0;
    mov.u32 %r4, 0;
$AGAIN:
    setp.ge.u32 %p1, %r3, %r1;
    @%p1 bra $DONE;
    add.u32 %r3, %r3, 1;
    add.u32 %r4, %r4, %r3;
    bra.uni $AGAIN;
$DONE:
    shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
    mad.wide.u32 %rd3, %r1, 4, %rd2;
    st.global.b32 [%rd3], %r5;
    """
    other = LANES ^ 1
    assert (run(body) == other * (other + 1) // 2).all()


@pytest.mark.parametrize(
    "text", ["sad.u32 $0, $1, $1, $1;", "add.cc.s32 $0, $1, $1;", "mov.v2.b32 $0, $1;"]
)
def test_what_is_not_known_is_named(text):
    name = text.split()[0].replace(".", r"\.")
    with pytest.raises(Unknown, match=f"{name} %r10"):
        apply(text, integers(32))


def test_a_shuffle_of_threads_that_are_not_there():
    text = "setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 $0, $1, 16, 31, 65535;"
    with pytest.raises(Fault, match="does not take part"):
        apply(text, integers(32))


def test_a_vote_of_threads_that_are_not_there():
    text = "setp.lt.u32 %p1, %r1, 16; @%p1 vote.sync.ballot.b32 $0, %p1, {};"
    assert (apply(text.format(0xFFFF), integers(32))[:16] == 0xFFFF).all()
    with pytest.raises(Fault, match="names threads that do not take part"):
        apply(text.format(-1), integers(32))


def test_a_kernel_that_does_not_end(monkeypatch):
    monkeypatch.setattr("bench.emulated.ptx.machine.MOST_BLOCKS", 1000)
    with pytest.raises(Fault, match="planted does not end"):
        run("$AGAIN:\n bra.uni $AGAIN;")
