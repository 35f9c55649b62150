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
from support import norm_cases
from support.operations import JOINING, SUPERVISED
from support.output_cases import Case, leaves, make
from support.specialisation import Key, recorded, specialisation

from bench.compile_cases import aggregate_launches, norm_launches
from bench.kernel_bytes import Layer, resnet50

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


def norm_keys(capacity: int, layers, dtype: torch.dtype, last: bool, side: int = 1) -> set[Key]:
    """The keys of a training step's BatchNorm; side: how much larger the images are."""
    found = set()
    for layer in layers:
        shape = (capacity, layer.channels, side * layer.side, side * layer.side)
        given = (dtype, last, layer.activation, layer.residual)
        launches = norm_launches(shape, *given).values()
        found |= {specialisation(x.kernel, **x.values, **x.options) for x in launches}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_a_whole_network_shares_the_kernels_of_batch_norm(dtype):
    """For each of three widths of tiles: statistics and what joins them, forward and sums of the
    gradient by what follows (nothing, ReLU, the sum and ReLU), the input's gradient by whether an
    activation is to be differentiated. What joins the gradient's sums knows no tiles."""
    seen = norm_keys(24, resnet50(), dtype, last=True)
    assert len(seen) <= 3 * (2 + 3 + 3 + 2) + 1
    for capacity in (1, 4, 12, 17, 32, 256):
        assert not norm_keys(capacity, resnet50(), dtype, last=True) - seen
    assert not norm_keys(24, resnet50(), dtype, last=True, side=2) - seen
    wider = [replace(layer, channels=2 * layer.channels) for layer in resnet50()]
    assert not norm_keys(24, wider, dtype, last=True) - seen


def test_contiguous_maps_have_kernels_for_each_width_of_loads():
    """Of 8 positions, 4 and 1, for 56x56, 14x14 and 7x7 maps: 11 kernels each."""
    seen = norm_keys(24, resnet50(), torch.bfloat16, last=False)
    assert len(seen) <= 3 * 11
    for capacity in (1, 17, 256):
        assert not norm_keys(capacity, resnet50(), torch.bfloat16, last=False) - seen


def test_networks_of_many_widths_have_few_kernels():
    """A MobileNet's, of which each is a multiple of 8."""
    channels = (16, 24, 40, 48, 72, 88, 96, 120, 144, 240, 288, 576)
    layers = [Layer(14, c, activation) for c in channels for activation in ("relu", "hardswish")]
    seen = norm_keys(24, layers, torch.bfloat16, last=True)
    assert len(seen) <= 3 * (2 + 2 + 2 + 2) + 1
    assert not norm_keys(17, layers, torch.bfloat16, last=True) - seen


@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_another_count_and_another_capacity_of_batch_norm(layout, device):
    """The launches themselves, not their plans alone: a count is a tensor."""
    keys = []
    for n, capacity in ((3, 5), (2, 5), (1, 5), (16, 16), (9, 17)):
        case = norm_cases.Case("", n, capacity, 5, (4, 4), layout, activation="relu", residual=True)
        inputs = norm_cases.make(case, torch.float32, device)
        with recorded() as found:
            norm_cases.outcome(case, inputs, "kernels")
        keys.append(found)
    assert len(keys[0]) == 6
    assert all(found == keys[0] for found in keys)
