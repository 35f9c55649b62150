"""Triton kernels with a fault, and without it: the emulator finds the one and passes the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from .driver import emulated
from .memory import Fault


@triton.jit
def _double(out_ptr, x_ptr, N, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0)
    tl.store(out_ptr + offs, 2 * x, mask=(offs < N) | (not MASKED))


def out_of_bounds(masked: bool) -> None:
    """A store without its mask, into a result that is no multiple of a block."""
    x = torch.arange(300, dtype=torch.int32)
    out = torch.zeros_like(x)
    _double[(3,)](out, x, 300, MASKED=masked, BLOCK=128)
    assert torch.equal(out, 2 * x)


@triton.jit
def _neighbour(out_ptr, STEP: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out_ptr + program, program + tl.load(out_ptr + program + STEP))


def reads_a_neighbour(step: int) -> None:
    """Programs 0 to 3 that read, with step 1, where the next one writes."""
    out = torch.zeros(8, dtype=torch.int32)
    _neighbour[(4,)](out, STEP=step)
    assert out.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]


@triton.jit
def _in_place(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def in_place(num_warps: int) -> None:
    """Every warp reads a number that the first one then replaces, with no barrier between."""
    x = torch.zeros(1, dtype=torch.int32)
    _in_place[(1,)](x, num_warps=num_warps)
    assert x.item() == 1


@triton.jit
def _write(out_ptr, OWN: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out_ptr + (program if OWN else 0), program)


def writes_one_place(own: bool) -> None:
    """Programs that all write the first element."""
    out = torch.zeros(4, dtype=torch.int32)
    _write[(4,)](out, OWN=own)
    assert out.tolist() == [0, 1, 2, 3]


@triton.jit
def _shifted(out_ptr, x_ptr, start, BLOCK: tl.constexpr):
    offs = tl.max_contiguous(tl.multiple_of(start + tl.arange(0, BLOCK), 4), 4)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + offs))


def not_aligned(start: int) -> None:
    """A promise of alignment that is not kept."""
    x, out = torch.arange(600, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    _shifted[(1,)](out, x, start, BLOCK=512)
    assert torch.equal(out, x[start : start + 512])


@triton.jit
def _asserted(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.device_assert(x >= 0, "a negative number")
    tl.store(x_ptr + tl.arange(0, BLOCK), x + 1)


def assertion(value: int) -> None:
    x = torch.zeros(64, dtype=torch.int32)
    x[37] = value
    _asserted[(1,)](x, BLOCK=64, debug=True)
    assert x[37] == value + 1


@triton.jit
def _sums(out_ptr, x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(x, axis=0))


def summed(without: str | None = None) -> None:
    """A sum over four warps, which goes through shared memory; without some of its code."""
    x, out = torch.arange(2048, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with emulated(edit=lambda text: re.sub(without, "", text) if without else text):
        _sums[(2,)](out, x, BLOCK=1024)
    assert torch.equal(out, x.view(2, 1024).sum(1).int())


def found(match: str, run: Callable[[], None]) -> None:
    """Raises AssertionError unless ``run`` raises a Fault that says ``match``."""
    try:
        run()
    except Fault as fault:
        if re.search(match, str(fault)):
            return
        raise
    raise AssertionError(f"not found: {match}")


BARRIER, SHARED_STORE = r"bar\.sync\s+0;", r"(@%p\d+\s+)?st\.shared[^;]*;"
CASES = {
    "planted: store in bounds": partial(out_of_bounds, True),
    "planted: store out of bounds": partial(
        found, "store out of bounds: .* of out_ptr, which has 1200", partial(out_of_bounds, False)
    ),
    "planted: a program reads what nobody writes": partial(reads_a_neighbour, 4),
    "planted: a program reads what another writes": partial(
        found,
        "race between programs: . reads what another",
        partial(reads_a_neighbour, 1),
    ),
    "planted: a warp in place": partial(in_place, 1),
    "planted: four warps in place": partial(
        found, "race: a warp writes what another one used", partial(in_place, 4)
    ),
    "planted: programs write their own place": partial(writes_one_place, True),
    "planted: programs write one place": partial(
        found, "race between programs: . writes what another", partial(writes_one_place, False)
    ),
    "planted: aligned": partial(not_aligned, 8),
    "planted: not aligned": partial(found, "misaligned load of 16 bytes", partial(not_aligned, 2)),
    "planted: an assertion that holds": partial(assertion, 0),
    "planted: an assertion that does not": partial(
        found, "device assertion: a negative number, program 0", partial(assertion, -1)
    ),
    "planted: a sum over warps": summed,
    "planted: a sum without its barriers": partial(
        found, "nothing wrote|race: a warp reads", partial(summed, BARRIER)
    ),
    "planted: a sum without its stores": partial(
        found, "shared memory that nothing wrote", partial(summed, SHARED_STORE)
    ),
}
