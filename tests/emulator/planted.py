"""Triton kernels with a fault, and without it: the emulator finds the one and passes the other.

One of each kind, to see that a fault is found in what Triton compiles and named as Triton names it;
every fault that the emulator knows is planted in PTX, in test_faults.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from bench.emulated.ptx.driver import emulated
from bench.emulated.ptx.memory import Fault


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
