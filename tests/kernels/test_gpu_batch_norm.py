"""masked_batch_norm on a device: nothing is waited for, captured once it serves every count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.norm_cases import STATISTICS, Case, assert_rounded, make, normalised, outcome

pytestmark = pytest.mark.gpu
LAYERS = [
    Case("first maps", n=20, capacity=24, c=64, trailing=(56, 56), activation="relu"),
    Case("last maps", n=21, capacity=24, c=2048, trailing=(7, 7), activation="relu",
         residual=True),
    Case("odd channels", n=5, capacity=8, c=37, trailing=(9, 11), activation="silu"),
]  # fmt: skip
layers = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.why)
both = pytest.mark.parametrize("layout", ["contiguous", "last"])
NAMES = ("x", "weight", "bias", "residual")


@both
@layers
def test_values(case, layout, device):
    case = replace(case, layout=layout)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make(case, dtype, device)
        assert_rounded(case, inputs, outcome(case, inputs, "triton"))


@layers
def test_the_device_is_never_waited_for(case, device):
    inputs = make(case, torch.bfloat16, device)
    outcome(case, inputs, "triton")  # kernels are compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(case, inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both
@layers
def test_a_captured_call_serves_every_count(case, layout, device):
    """To the bit what the eager call gives, of the result, the gradients and the statistics."""
    case = replace(case, layout=layout, n=case.capacity, residual=True)
    inputs = make(case, torch.bfloat16, device)
    i = inputs.copy()
    leaves = [getattr(i, name) for name in NAMES]
    before = [getattr(i, name).clone() for name in STATISTICS]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(normalised(case, i, "triton"), leaves, i.d_y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = normalised(case, i, "triton")
        gradients = torch.autograd.grad(y, leaves, i.d_y)
    for n in (case.capacity, 3, 1, 0, 2):
        i.count.fill_(n)
        for name, value in zip(STATISTICS, before, strict=True):
            getattr(i, name).copy_(value)
        graph.replay()
        expected = outcome(case, replace(inputs, count=i.count), "triton")
        assert torch.equal(y, expected["y"])
        for name, gradient in zip(NAMES, gradients, strict=True):
            assert torch.equal(gradient, expected[f"d_{name}"]), (n, name)
        for name in STATISTICS:
            assert torch.equal(getattr(i, name), expected[name]), (n, name)


@layers
def test_repeats_are_bit_equal(case, device):
    inputs = make(case, torch.bfloat16, device)
    first = outcome(case, inputs, "triton")
    for _ in range(20):
        for name, found in outcome(case, inputs, "triton").items():
            assert torch.equal(found, first[name]), name


def test_compiled_by_inductor(device):
    case = LAYERS[2]
    inputs = make(case, torch.float32, device)
    compiled, i = torch.compile(normalised, fullgraph=True), inputs.copy()
    y = compiled(case, i, "triton")
    y.backward(inputs.d_y)
    expected = outcome(case, inputs, "triton")
    torch.testing.assert_close(y, expected["y"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(i.x.grad, expected["d_x"], rtol=1e-5, atol=1e-5)
    assert torch.equal(i.running_var, expected["running_var"])
