"""Tensor cores: matrices in registers and shared memory, and their products.

Fragments as PTX lays them out: lane l of a warp holds, of every 8 x 8 block, row l // 4 and columns
2 (l % 4) and one more. Products are summed in float64 and rounded to float32 once an instruction.
"""

from __future__ import annotations

import re

import numpy as np

from .decode import Code, Source, Step, decodes
from .kinds import B32, F32, PRED, U64, Kind
from .memory import Fault
from .parse import Unknown
from .threads import WARP, Threads
from .warps import by_warp

_ROW, _COLUMN = np.arange(WARP) // 4, 2 * (np.arange(WARP) % 4)
_COUNTS = {"x1": 1, "x2": 2, "x4": 4}


def _blocks_of(code: Code) -> int:
    if "m8n8" not in code.modifiers or code.kind.name != "b16":
        raise Unknown(code.text)
    return _COUNTS[code.one_of(*_COUNTS)]


def _row_places(threads: Threads, address: Source, warps: np.ndarray, blocks: int) -> tuple:
    """Addresses [warps * blocks * 8] of the blocks' rows, lane 8 i + j of a warp gives row j of
    block i, and the threads that gave them."""
    lanes = (warps[:, None] * WARP + np.arange(8 * blocks)).reshape(-1)
    return np.broadcast_to(address(threads), threads.count)[lanes], lanes


@decodes("ldmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def _ldmatrix(code: Code) -> Step:
    blocks, turned = _blocks_of(code), "trans" in code.modifiers
    targets, address = [code.target(p, B32) for p in code.vector(0)], code.shared_address(1)

    def run(threads: Threads) -> None:
        warps = threads.warps(code.text)
        places, lanes = _row_places(threads, address, warps, blocks)
        rows = threads.shared.load(places, 16, threads.who(lanes)).view(np.uint16)
        found = rows.reshape(len(warps), blocks, 8, 8)
        found = found.swapaxes(2, 3) if turned else found
        pairs = np.ascontiguousarray(found).view(np.uint32).reshape(len(warps), blocks, WARP)
        for i, target in enumerate(targets):
            full = np.zeros((threads.count // WARP, WARP), np.uint32)
            full[warps] = pairs[:, i]
            target(threads, full.reshape(-1))

    return run


@decodes("stmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def _stmatrix(code: Code) -> Step:
    blocks, turned = _blocks_of(code), "trans" in code.modifiers
    sources, address = [code.source(p, B32) for p in code.vector(1)], code.shared_address(0)

    def run(threads: Threads) -> None:
        warps = threads.warps(code.text)
        parts = [by_warp(threads, source(threads))[warps] for source in sources]
        found = np.stack(parts, axis=1).view(np.uint16).reshape(len(warps), blocks, 8, 8)
        found = np.ascontiguousarray(found.swapaxes(2, 3)) if turned else found
        places, lanes = _row_places(threads, address, warps, blocks)
        threads.shared.store(places, found.view(np.uint8).reshape(-1, 16), threads.who(lanes))

    return run


def _pair(half: Kind, bits: np.ndarray) -> np.ndarray:
    """[..., 32] registers as [..., 32, 2] numbers, the lower half first."""
    return half.values(np.ascontiguousarray(bits).view(np.uint16)).reshape(*bits.shape, 2)


def _operand_a(half: Kind, registers: list[np.ndarray]) -> np.ndarray:
    """[warps, 16, 16] of four registers: upper and lower rows, then the right columns."""
    found = np.zeros((len(registers[0]), 16, 16))
    for i, register in enumerate(registers):
        row, column = _ROW + 8 * (i % 2), _COLUMN + 8 * (i // 2)
        pair = _pair(half, register)
        found[:, row, column], found[:, row, column + 1] = pair[..., 0], pair[..., 1]
    return found


@decodes("mma", modifiers="sync aligned m16n8k16 row col")
def _mma(code: Code) -> Step:
    """A warp's [16, 16] x [16, 8] of half precision, added to float32."""
    if code.modifiers != ("sync", "aligned", "m16n8k16", "row", "col"):
        raise Unknown(code.text)
    half = _half(code)
    targets = [code.target(p, F32) for p in code.vector(0)]
    a_of, b_of = ([code.source(p, B32) for p in code.vector(i)] for i in (1, 2))
    c_of = [code.source(p, F32) for p in code.vector(3)]

    def run(threads: Threads) -> None:
        threads.warps(code.text)
        a, b, c = ([by_warp(threads, source(threads)) for source in x] for x in (a_of, b_of, c_of))
        right = np.zeros((threads.count // WARP, 16, 8))
        for i, register in enumerate(b):
            pair, row = _pair(half, register), _COLUMN + 8 * i
            right[:, row, _ROW], right[:, row + 1, _ROW] = pair[..., 0], pair[..., 1]
        product = _operand_a(half, a) @ right
        for i, (target, addend) in enumerate(zip(targets, c, strict=True)):
            total = product[:, _ROW + 8 * (i // 2), _COLUMN + i % 2] + addend
            target(threads, total.astype(np.float32).reshape(-1))

    return run


def _half(code: Code) -> Kind:
    """The operands' type, the same for both; the result is float32."""
    first, second = (kind for kind in code.kinds if kind is not F32)
    if first is not second or first.name not in ("f16", "bf16") or F32 not in code.kinds:
        raise Unknown(code.text)
    return first


def _offsets(descriptor: int, rows: int, turned: bool) -> np.ndarray:
    """[rows, 16] byte offsets in shared memory of a matrix of half precision, one step along K, as
    wgmma is told (PTX, matrix descriptor): rows of ``width`` bytes, whose 16-byte pieces are
    permuted. turned: K is outermost."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width, permuted = ((16, 0), (128, 7), (64, 3), (32, 1))[descriptor >> 62 & 3]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if turned:
        elements = width // 2
        offset = row // elements * leading + row % elements * 2
        offset = offset + k // 8 * stride + k % 8 * width
    else:
        offset = row // 8 * stride + row % 8 * width
        offset = offset + 2 * k // width * leading + 2 * k % width
    place = start + offset
    return place ^ ((place >> 7 & permuted) << 4)


@decodes(
    "wgmma",
    modifiers="fence commit_group wait_group mma_async sync aligned "
    + " ".join(f"m64n{n}k16" for n in range(8, 257, 8)),
)
def _wgmma(code: Code) -> Step:
    kind = code.modifiers[0]
    if kind == "fence":
        return lambda threads: None
    if kind == "commit_group":
        return lambda threads: threads.products.commit(threads.which())
    if kind == "wait_group":
        newest = int(code.operands[0], 0)
        return lambda threads: threads.products.wait(threads.which(), newest)
    return _WarpGroupProduct(code)


class _WarpGroupProduct:
    """Four warps' [64, 16] x [16, n], added to float32; A in registers or, as B, shared memory.

    Carried out at once, but what it reads stays in use until its group is waited for.
    """

    def __init__(self, code: Code) -> None:
        self.text, self.half = code.text, _half(code)
        self.n = int(re.match(r"m64n(\d+)k16", code.modifiers[-1])[1])
        self.targets = [code.target(p, F32) for p in code.vector(0)]
        self.addends = [code.source(p, F32) for p in code.vector(0)]
        from_registers = isinstance(code.operands[1], tuple)
        self.a_registers = [code.source(p, B32) for p in code.vector(1)] if from_registers else []
        self.a_descriptor = None if from_registers else code.source(1, U64)
        self.b_descriptor, self.accumulates = code.source(2, U64), code.source(3, PRED)
        if code.operands[4:6] != ("1", "1"):  # signs of A and B
            raise Unknown(code.text)
        turned = [operand != "0" for operand in code.operands[6:]]
        self.a_turned, self.b_turned = [False, *turned] if from_registers else turned

    def __call__(self, threads: Threads) -> None:
        groups = self._groups(threads)
        old = [by_warp(threads, source(threads)) for source in self.addends]
        new = [part.copy() for part in old]
        keep = by_warp(threads, self.accumulates(threads))
        products = [self._left(threads, warps) @ self._right(threads, warps) for warps in groups]
        warps, tiles = groups.reshape(-1), np.reshape(products, (-1, 16, self.n))
        for j, part in enumerate(new):
            # A warp holds 16 rows; register j: block j // 4 of 8 columns, lower rows from 2 on.
            row, column = _ROW + 8 * (j // 2 % 2), 8 * (j // 4) + _COLUMN + j % 2
            start = np.where(keep[warps], old[j][warps].astype(np.float64), 0.0)
            part[warps] = (start + tiles[:, row, column]).astype(np.float32)
        for target, part in zip(self.targets, new, strict=True):
            target(threads, part.reshape(-1))

    def _groups(self, threads: Threads) -> np.ndarray:
        """[groups, 4] warps."""
        warps = threads.warps(self.text)
        groups = warps.reshape(-1, 4)
        if (groups % 4 != np.arange(4)).any():
            raise Fault(f"{self.text} by a part of a warp group")
        return groups

    def _left(self, threads: Threads, warps: np.ndarray) -> np.ndarray:
        if self.a_descriptor is not None:
            return self._fetch(threads, self.a_descriptor, warps, 64, self.a_turned)
        registers = [by_warp(threads, source(threads))[warps] for source in self.a_registers]
        return _operand_a(self.half, registers).reshape(64, 16)

    def _right(self, threads: Threads, warps: np.ndarray) -> np.ndarray:
        return self._fetch(threads, self.b_descriptor, warps, self.n, self.b_turned).T

    def _fetch(self, threads, source: Source, warps, rows: int, turned: bool) -> np.ndarray:
        """[rows, 16] from shared memory, read in the name of the first warp's threads."""
        descriptors = by_warp(threads, source(threads))[warps]
        if (descriptors != descriptors[0, 0]).any():
            raise Fault(f"{self.text}: a warp group's descriptors differ")
        shared = threads.shared
        offsets = _offsets(int(descriptors[0, 0]), rows, turned).reshape(-1)
        thread = np.full(len(offsets), warps[0] * WARP)
        who = threads.who(thread)
        places = shared.places(offsets, 2, who, "product")
        granules = shared.reading(places, 2, who)
        shared.in_use[granules] += 1  # each once: no two elements share a place

        def finish(done: np.ndarray) -> None:
            shared.in_use[granules[done]] -= 1
            # It may have read until now, which may be in a later phase.
            shared.note_reads(places[done], granules[done], threads.who(thread[done]))

        threads.products.start(thread, finish)
        values = self.half.values(shared.get(places, 2).view(np.uint16).reshape(-1))
        return values.reshape(rows, 16).astype(np.float64)
