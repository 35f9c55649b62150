"""Another batch size, or another split of the rows over the experts, compiles nothing again.

A kernel that is compiled again stops training for about a second; with an epoch's last batch, or an
evaluation's, that used to be four to eight kernels. The router is in ``test_router_compiles.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hubpath_fast.kernels import gather, gather_into
from support.operations import JOINING, SUPERVISED
from support.output_cases import Case, leaves, make
from support.specialisation import Key, recorded, specialisation

from bench.compile_cases import aggregate_launches

M, K = 5, 2
FIRST, OTHERS = 48, (47, 32, 24, 17, 64)


def gather_images(case: Case, dtype: torch.dtype, device) -> None:
    """Images as bytes and as floats, to rows in each layout and to static input buffers;
    features with a gradient."""
    i = make(case, torch.float32, device)
    scale = torch.rand(case.m, 3, device=device)
    images = torch.randint(256, (case.n, 3, 6, 6), dtype=torch.uint8, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        gather(images, i, scale, scale, dtype, layout)
        out = torch.empty(case.m * case.n, 3, 6, 6, dtype=dtype, device=device)
        gather_into(out.contiguous(memory_format=layout), images, i, scale, scale)
    for shape in ((64,), (10,), (16, 12, 12)):
        x = torch.randn(case.n, *shape, device=device).requires_grad_()
        last = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        rows = gather(x, i, None, None, dtype, last)
        torch.autograd.grad(rows.sum(), x)


def join(case: Case, dtype: torch.dtype, device) -> None:
    """Everything that takes the experts' outputs, forward and backward."""
    i = make(case, dtype, device)
    tensors = leaves(*i.sources)
    for operation in (*JOINING, *SUPERVISED):
        results = operation(*tensors, i)
        sum(result.float().sum() for result in results).backward()


@cache
def kernels_of(step: Callable[..., None], case: Case, dtype: torch.dtype, device) -> set[Key]:
    with recorded() as keys:
        step(case, dtype, device)
    assert keys
    return keys


parts = pytest.mark.parametrize("part", [gather_images, join])


@pytest.mark.parametrize("n", OTHERS)
@parts
def test_another_batch_size(part, n, device):
    case = Case("", m=M, k=K)
    first, other = (
        kernels_of(part, replace(case, n=size), torch.float32, device) for size in (FIRST, n)
    )
    assert not other - first


@pytest.mark.parametrize("n", [47, 17])
@pytest.mark.parametrize(
    "case",
    [
        Case("bfloat16", c=100, c_out=100),
        Case("maps", c=5, trailing=(4, 4)),
        Case("maps in channels last", c=5, trailing=(4, 4), channels_last=True),
        Case("one sample per expert", m=19, k=3),
    ],
    ids=lambda case: case.why,
)
def test_another_batch_size_of_other_outputs(case, n, device):
    first, other = (
        kernels_of(join, replace(case, n=size), torch.bfloat16, device) for size in (FIRST, n)
    )
    assert not other - first


@pytest.mark.parametrize("scores", ["one", "gaps"])
@parts
def test_another_routing(part, scores, device):
    """All rows to K experts, or none to every other one."""
    case = Case("", n=FIRST, m=M, k=K)
    first, other = (
        kernels_of(part, replace(case, scores=s), torch.float32, device) for s in ("random", scores)
    )
    assert not other - first


def aggregate_keys(n: int, m: int, c: int, dtype: torch.dtype) -> set[Key]:
    """The keys of aggregate's launches at sizes that would take the interpreter minutes."""
    launches = aggregate_launches(n, m, K, c, (), dtype)
    del launches["backward rows"]  # the one with the loss is another kernel
    return {specialisation(x.kernel, **x.values, **x.options) for x in launches.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("m", "c", "most"),
    [(5, 10, 0), (5, 100, 0), (64, 1000, 0), (32, 100, 2), (5, 1000, 2), (2, 20000, 2)],
)
def test_however_different_the_batch(m, c, most, dtype):
    """In between, tiles differ for few rows and for many: of two kernels. Shares of the matrix's
    gradient, which come with many rows, are no kernel of their own, nor is a single tile of C."""
    seen = aggregate_keys(FIRST, m, c, dtype)
    assert len(seen) == 4
    new = [len(aggregate_keys(n, m, c, dtype) - seen) for n in (1, 17, 512, 4096, 65536, 2**20)]
    assert max(new) <= most, new
    assert new[:2] == [0, 0]
