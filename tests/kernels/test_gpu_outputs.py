"""combine, aggregate and exploit_loss on a GPU: what an interpreter cannot show.

The value tests of the neighbouring files already run on the device where there is one; here are
races (many repeats), waits for the device, graph capture, assertions and large offsets.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hubpath_fast.kernels import (
    aggregate,
    aggregate_with_exploit_loss,
    combine,
    combine_with_exploit_loss,
    exploit_loss,
)
from support.output_cases import (
    Case,
    aggregate_reference,
    assert_within,
    concat_reference,
    double,
    leaves,
    loss_reference,
    make,
)

pytestmark = pytest.mark.gpu

SIZES = [
    Case("paper's size", n=48, m=5, c=100, c_out=100),
    Case("many experts", n=512, m=64, c=1000, c_out=1000),
    Case("few experts, many rows: shares", n=4096, m=2, c=10, c_out=10),
    Case("maps", n=8, m=5, c=19, c_out=19, trailing=(16, 16)),
    Case("maps, channels last", n=8, m=5, c=19, c_out=19, trailing=(16, 16), channels_last=True),
]
sizes = pytest.mark.parametrize("case", SIZES, ids=lambda case: case.why)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)


def glue(tensors, inputs) -> tuple[torch.Tensor, ...]:
    """Every operation of these files once, forward and backward."""
    outputs, weights, matrix, bias = tensors
    target = inputs.target
    concat, loss = combine_with_exploit_loss(outputs, weights, inputs, target, 0.1)
    y, loss_y = aggregate_with_exploit_loss(
        outputs, weights, inputs, matrix, bias, target, 0.1, grouped=True
    )
    plain = aggregate(outputs, weights, inputs, matrix, bias, grouped=True)
    alone = exploit_loss(outputs, inputs, target)
    concat_alone = combine(outputs, weights, inputs)
    one = torch.ones_like(loss)
    results = (concat, concat_alone, y, plain, loss, loss_y, alone)
    gradients = torch.autograd.grad(
        results,
        tensors,
        (inputs.d_concat, inputs.d_concat, inputs.d_y, inputs.d_y, one, one, one),
    )
    return (*(r.detach() for r in results), *gradients)


@dtypes
@sizes
def test_matches_the_loop(case, dtype, device):
    """Looser than the interpreter's tests, which derive their bounds: large sizes, all at once."""
    inputs = make(case, dtype, device)
    tensors = leaves(*inputs.sources)
    concat, _, y, _, loss, loss_y, alone, *gradients = glue(tensors, inputs)

    exact = double(*tensors)
    expected = concat_reference(*exact[:2], inputs)
    expected_y = aggregate_reference(*exact, inputs)
    smoothed, plain = loss_reference(exact[0], inputs, 0.1), loss_reference(exact[0], inputs)
    total = 2 * (expected * inputs.d_concat.double()).sum() + plain + 2 * smoothed
    total = total + 2 * (expected_y * inputs.d_y.double()).sum()
    wanted = torch.autograd.grad(total, exact)
    # Up to four contributions are added in the dtype of the leaf, each rounded; sums of a few
    # thousand float32 terms stay within 1e-4 of the largest.
    unit = 4 * {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    for name, actual, reference in (
        ("concat", concat, expected),
        ("y", y, expected_y),
        ("loss", loss, smoothed),
        ("loss beside y", loss_y, smoothed),
        ("loss alone", alone, plain),
        *zip(("d_outputs", "d_weights", "d_matrix", "d_bias"), gradients, wanted, strict=True),
    ):
        assert_within(actual, reference, unit * (1 + reference.detach().abs().max()), name)


@sizes
def test_a_thousand_repeats_are_bit_equal(case, device):
    """A race or an order that varies would show sooner or later."""
    inputs = make(case, torch.bfloat16, device)
    tensors = leaves(*inputs.sources)
    first = glue(tensors, inputs)
    differs = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(1000):
        for a, b in zip(first, glue(tensors, inputs), strict=True):
            differs |= (a != b).any()
    assert not differs.item()


@sizes
def test_no_wait_for_the_device(case, device):
    inputs = make(case, torch.bfloat16, device)
    tensors = leaves(*inputs.sources)
    glue(tensors, inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        glue(tensors, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@sizes
def test_a_captured_step_follows_its_inputs(case, device):
    inputs, other = (make(case, torch.bfloat16, device, seed=seed) for seed in (0, 1))
    expected = glue(leaves(*other.sources), other)
    tensors = leaves(*inputs.sources)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        glue(tensors, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = glue(tensors, inputs)
    with torch.no_grad():  # other rows, other experts, other targets: nothing was read on the host
        for name, value in vars(inputs).items():
            value.copy_(getattr(other, name))
        for tensor, value in zip(tensors, other.sources, strict=True):
            tensor.copy_(value)
    graph.replay()
    for replayed, eager in zip(captured, expected, strict=True):
        assert torch.equal(replayed, eager)


@sizes
def test_compiled_by_inductor(case, device):
    inputs = make(case, torch.float32, device)

    def step(outputs, weights, matrix, bias):
        y, loss = aggregate_with_exploit_loss(
            outputs, weights, inputs, matrix, bias, inputs.target, grouped=True
        )
        return (y * inputs.d_y).sum() + loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        tensors = leaves(*inputs.sources)
        results.append(torch.autograd.grad(function(*tensors), tensors))
    for eager, compiled in zip(*results, strict=True):
        assert_within(compiled, eager.double(), 1e-5 * (1 + eager.abs().max()), "compiled")


def test_a_target_out_of_range_is_a_device_assertion():
    """In a process of its own: the assertion leaves the device's context unusable."""
    script = """
import torch
from types import SimpleNamespace
from hubpath_fast.kernels import exploit_loss
outputs = torch.randn(4, 10, device="cuda")
rows = torch.arange(4, dtype=torch.int32, device="cuda")
target = torch.tensor([0, 1, 2, 10], device="cuda")
exploit_loss(outputs, SimpleNamespace(rows=rows, experts=target[:, None]), target)
torch.cuda.synchronize()
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode != 0
    assert "cross-entropy: target out of range" in process.stdout + process.stderr


def test_offsets_beyond_32_bits(device):
    """A concatenation of 2.2 billion elements: int32 offsets would wrap and write elsewhere."""
    n, m, c = 17_000, 64, 2048
    needed = 2 * n * m * c * 2 + 2**30  # the concatenation and its gradient, in bfloat16
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory")
    outputs = torch.randn(n, c, device=device, dtype=torch.bfloat16, requires_grad=True)
    experts = torch.full((n, 1), m - 1, device=device)
    weights = torch.full((n, 1), 0.5, device=device)
    slots = torch.arange(n, dtype=torch.int32, device=device)
    offsets = torch.zeros(m + 1, dtype=torch.int32, device=device)
    offsets[-1] = n
    plan = SimpleNamespace(experts=experts, positions=slots[:, None], offsets=offsets)
    concat = combine(outputs, weights, plan)
    assert torch.equal(concat[:, -c:], outputs * 0.5)
    assert not concat[:, :-c].any()
    del concat
    gradient = torch.zeros(n, m * c, device=device, dtype=torch.bfloat16)
    gradient[:, -c:] = 1
    concat = combine(outputs, weights, plan)
    concat.backward(gradient)
    assert (outputs.grad == 0.5).all()
