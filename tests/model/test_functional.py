"""The public operations: defaults, checks, choice of the form, and routing against the reference.

What they compute is tested for both implementations in tests/kernels. 1e-10: both sides do the same
few float64 operations (unit roundoff 1.1e-16) in another order; only a wrong formula can differ by
more.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hubpath_fast import _torch_ops, reference
from hubpath_fast import functional as HF

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LAST = torch.channels_last


def scores(n, m, seed=0):
    random = torch.Generator().manual_seed(seed)
    clean, noise, eps = torch.randn(3, n, m, dtype=torch.float64, generator=random).unbind()
    return clean.requires_grad_(), noise.requires_grad_(), eps


def routed(n, m, k, dtype=torch.float64, device="cpu"):
    return HF.noisy_topk(*(t.detach().to(device, dtype) for t in scores(n, m)[:2]), k)


def rows_of(routing, c):
    """Outputs [R, C] that require a gradient, of the routing's dtype and device."""
    shape = (routing.num_samples * routing.k, c)
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(shape, dtype=torch.float64, generator=random)
    return rows.to(routing.weights).requires_grad_()


@st.composite
def sizes(draw):
    m = draw(st.integers(1, 64))
    return draw(st.integers(1, 257)), m, draw(st.integers(1, m))


def assert_same_routing(ours, truth):
    for name in ("weights", "mean", "experts", "offsets", "rows", "positions"):
        a, b = getattr(ours, name), getattr(truth, name)
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@given(sizes=sizes(), seed=st.integers(0, 99), renormalize=st.booleans(), noisy=st.booleans())
@settings(max_examples=40, deadline=None)
def test_routing_and_its_gradients_equal_the_reference(sizes, seed, renormalize, noisy):
    n, m, k = sizes
    grads = []
    for implementation in (HF, reference):
        clean, noise, eps = scores(n, m, seed)
        routing = implementation.noisy_topk(clean, noise, k, eps if noisy else None, renormalize)
        upstream = torch.linspace(-1, 1, n * k, dtype=torch.float64).view(n, k)
        loss = (routing.weights * upstream).sum() + HF.exploration_loss(routing.mean)
        inputs = (clean, noise) if noisy else (clean,)
        grads.append((routing, torch.autograd.grad(loss, inputs)))
    assert_same_routing(grads[0][0], grads[1][0])
    for ours, truth in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(ours, truth, **CLOSE)


def test_draw_takes_its_noise_from_torchs_generator():
    clean, noise = torch.randn(8, 5), torch.randn(8, 5)
    torch.manual_seed(11)
    drawn = HF.noisy_topk(clean, noise, 2, "draw")
    torch.manual_seed(11)
    given_eps = HF.noisy_topk(clean, noise, 2, torch.randn(8, 5))
    assert torch.equal(drawn.weights, given_eps.weights)


def test_the_grouped_product_is_chosen_where_it_saves_enough():
    def preferred(n, m, k, c):
        return _torch_ops.prefer_grouped(torch.empty(n * k, c), torch.empty(c, m * c), k)

    assert not preferred(48, 5, 2, 10)
    assert preferred(512, 16, 2, 1000)
    assert preferred(512, 16, 2, 1001)  # no alignment is asked for
    assert not preferred(4096, 4, 4, 100)  # K = M: nothing to save
    assert [preferred(n, 64, 2, 100) for n in (1, 16, 256, 4096)] == [False, False, True, True]


def test_the_grouped_aggregate_computes_only_the_gradients_asked_for():
    routing = routed(6, 3, 2)
    outputs, matrix = rows_of(routing, 4), torch.ones(4, 12, dtype=torch.float64)
    y = _torch_ops.aggregate(outputs, routing.weights, routing, matrix, None, grouped=True)
    (found,) = torch.autograd.grad(y.sum(), outputs)
    w = routing.weights.flatten()[routing.rows]  # d y.sum() / d outputs[r, c] = w * C_OUT ones
    torch.testing.assert_close(found, (4 * w)[:, None].expand(-1, 4), **CLOSE)


def test_the_grouped_aggregate_compiles_without_a_break():
    """float32: 1e-4 of sums of 64 products of size one (roundoff 6e-8 times a few hundred)."""
    routing = routed(40, 16, 2, torch.float32)
    outputs = rows_of(routing, 64)
    matrix = torch.linspace(-1, 1, 32 * 16 * 64).view(32, -1).requires_grad_()

    def function(outputs, matrix):
        return _torch_ops.aggregate(outputs, routing.weights, routing, matrix, None, grouped=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        y = call(outputs, matrix)
        results.append((y, *torch.autograd.grad(y.square().sum(), (outputs, matrix))))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-3)


def test_gather_keeps_dtype_and_layout_and_sums_gradients():
    routing = routed(6, 4, 3)
    x = torch.randn(6, 2, 3, 3).to(memory_format=LAST).requires_grad_()
    rows = HF.gather(x, routing)
    assert rows.is_contiguous(memory_format=LAST)
    buffers, count = torch.zeros(4 * 6, 2, 3, 3), routing.counts()[0]
    HF.gather_into(buffers, x.detach(), routing)
    assert torch.equal(buffers[:count], rows[:count])
    rows.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    pixels = torch.zeros(6, 2, dtype=torch.uint8)
    assert HF.gather(pixels, routing).dtype == torch.uint8
    assert HF.gather(pixels, routing, shift=torch.ones(4, 2)).dtype == torch.float32
    assert HF.gather(x.detach(), routing, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_exploration_loss_is_minus_the_entropy():
    even = HF.exploration_loss(torch.tensor([0.5, 0.5]))
    assert even.item() == pytest.approx(-0.693147, abs=1e-6)
    mean = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    loss = HF.exploration_loss(mean)
    loss.backward()
    assert loss.item() == 0
    assert mean.grad.isfinite().all()


def test_counts_reads_the_host_once():
    routing = routed(12, 4, 2)
    first = routing.counts()
    routing.offsets = None  # a second read would fail
    assert routing.counts() == first
    assert sum(first) == 24


def test_no_operation_reads_values_back():
    """Meta tensors have no values: whatever reads one raises."""
    clean = torch.empty(12, 4, device="meta", requires_grad=True)
    routing = HF.noisy_topk(clean, clean, 2, torch.empty(12, 4, device="meta"))
    HF.gather(torch.empty(12, 3, 8, 8, device="meta"), routing)
    outputs = torch.empty(24, 10, device="meta", requires_grad=True)
    y = HF.aggregate(outputs, routing, torch.empty(10, 40, device="meta"), None)
    target = torch.empty(12, dtype=torch.int64, device="meta")
    (y.sum() + HF.exploit_loss(outputs, routing, target)).backward()
    assert outputs.grad.shape == (24, 10)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_under_autocast_the_loss_is_of_the_outputs_as_they_came(backend, device):
    """Only the product is in bfloat16: its operands and its result lose 8 bits."""
    if backend == "triton":
        pytest.importorskip("triton")
    routing = routed(9, 4, 2, torch.float32, device)
    outputs = rows_of(routing, 6)
    matrix, bias = torch.randn(6, 24, device=device), torch.randn(6, device=device)
    target = torch.arange(9, device=device) % 6
    with torch.autocast(device.type, torch.bfloat16):
        y, loss = HF.aggregate_with_exploit_loss(
            outputs, routing, matrix, bias, target, backend=backend
        )
    exact = HF.exploit_loss(outputs, routing, target, backend="torch")
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)  # float32's sums of 6 terms
    (found,) = torch.autograd.grad(loss, outputs)
    (wanted,) = torch.autograd.grad(exact, outputs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    plain = HF.aggregate(outputs, routing, matrix, bias, backend="torch")
    assert y.dtype == torch.bfloat16
    terms = HF.aggregate(outputs.abs(), routing, matrix.abs(), bias.abs(), backend="torch")
    # The outputs, the matrix, the bias, weighted outputs and the result are each rounded.
    assert ((y.float() - plain).abs() <= 5 * 2.0**-7 * terms).all()


GOOD, X = torch.zeros(6, 4), torch.zeros(6, 3)
ROUTED = HF.noisy_topk(GOOD, GOOD, 2)
BUFFERS, OUTPUTS, MATRIX = torch.zeros(24, 3), torch.zeros(12, 3), torch.zeros(3, 12)
TARGET, COUNT = torch.zeros(6, dtype=torch.int64), torch.tensor(4, dtype=torch.int32)
# The message, the operation and its arguments.
BAD_CALLS = [
    (r"k: .*1\.\.4.*got 5", HF.noisy_topk, GOOD, GOOD, 5),
    (r"k: .*got 0", HF.noisy_topk, GOOD, GOOD, 0),
    (r"k: .*integer.*got 2\.0", HF.noisy_topk, GOOD, GOOD, 2.0),
    ("clean: empty batch", HF.noisy_topk, GOOD[:0], GOOD[:0], 1),
    (r"clean: .*\[N, M\]", HF.noisy_topk, GOOD[0], GOOD[0], 1),
    ("clean: .*int32", HF.noisy_topk, GOOD.int(), GOOD.int(), 1),
    (r"noise: .*\[6, 3\]", HF.noisy_topk, GOOD, X, 1),
    (r"eps: .*\[2, 4\]", HF.noisy_topk, GOOD, GOOD, 1, GOOD[:2]),
    ("eps: requires a gradient, which noisy_topk does not give; detach it",
     HF.noisy_topk, GOOD, GOOD, 1, GOOD.clone().requires_grad_()),
    ("eps: .*'yes'", HF.noisy_topk, GOOD, GOOD, 1, "yes"),
    ("backend: .*'cuda'", HF.noisy_topk, GOOD, GOOD, 1, None, False, "cuda"),
    (r"out: expected \[4 \* capacity, .* at least N=6, got shape \[20, 3\]",
     HF.gather_into, BUFFERS[:20], X, ROUTED),
    (r"rows of \[3\]", HF.gather_into, torch.zeros(24, 4), X, ROUTED),
    (r"out: expected a contiguous .* strides \(6, 2\)",
     HF.gather_into, torch.zeros(24, 6)[:, ::2], X, ROUTED),
    ("int32", HF.gather_into, BUFFERS.int(), X, ROUTED),
    ("x: requires a gradient", HF.gather_into, BUFFERS, X.clone().requires_grad_(), ROUTED),
    ("x: expected 6 samples", HF.gather, X[:5], ROUTED),
    ("x: .*int32", HF.gather, X.int(), ROUTED),
    (r"scale: .*\[4, 3\].*\[4, 2\]", HF.gather, X, ROUTED, torch.ones(4, 2)),
    ("shift: requires a gradient", HF.gather, X, ROUTED, None, torch.ones(4, 3).requires_grad_()),
    ("memory_format: expected", HF.gather, X, ROUTED, None, None, None, torch.preserve_format),
    ("memory_format: channels_last needs", HF.gather, X, ROUTED, None, None, None, LAST),
    (r"outputs: .*12 rows.*\[11, 3\]", HF.combine, OUTPUTS[:11], ROUTED),
    (r"outputs: .*\[R, C", HF.combine, OUTPUTS[:, 0], ROUTED),
    (r"weight: .*12.*\[3, 11\]", HF.aggregate, OUTPUTS, ROUTED, MATRIX[:, :11], None),
    ("weight: expected torch.float32 as outputs, got torch.float64",
     HF.aggregate, OUTPUTS, ROUTED, MATRIX.double(), None),
    (r"bias: expected \[3\]", HF.aggregate, OUTPUTS, ROUTED, MATRIX, torch.zeros(2)),
    ("bias: expected torch.float32 as outputs, got torch.float64",
     HF.aggregate, OUTPUTS, ROUTED, MATRIX, torch.zeros(3).double()),
    (r"target: expected shape \[6\]", HF.exploit_loss, OUTPUTS, ROUTED, TARGET[:5]),
    ("target: .*int64.*float32", HF.exploit_loss, OUTPUTS, ROUTED, TARGET.float()),
    (r"target: class 3 .*0\.\.2", HF.exploit_loss, OUTPUTS, ROUTED, TARGET + 3),
    ("label_smoothing: .*1.5", HF.exploit_loss, OUTPUTS, ROUTED, TARGET, 1.5),
    (r"ignore_index: expected an integer, got -100\.0",
     HF.exploit_loss, OUTPUTS, ROUTED, TARGET, 0.0, -100.0),
    ("mean: expected a float vector", HF.exploration_loss, GOOD),
    ("x: expected a float dtype, got torch.int32", HF.masked_batch_norm, X.int(), COUNT),
    (r"x: expected rows \[capacity, C, ...\] .* got \[6\]", HF.masked_batch_norm, X[:, 0], COUNT),
    (r"x: .* at least one element, got \[0, 3\]", HF.masked_batch_norm, X[:0], COUNT),
    (r"count: expected an int32 scalar tensor, got 4; take torch.tensor\(n, dtype=torch.int32",
     HF.masked_batch_norm, X, 4),
    (r"count: expected an int32 scalar on cpu, got torch.int64 \[\]",
     HF.masked_batch_norm, X, COUNT.long()),
    (r"count: .* got torch.int32 \[2\]", HF.masked_batch_norm, X, torch.stack([COUNT, COUNT])),
    (r"count: .*on meta", HF.masked_batch_norm, X, COUNT.to("meta")),
    (r"count: expected 0\.\.6 valid rows, since x has so many, got 7; give a larger buffer",
     HF.masked_batch_norm, X, COUNT + 3),
    (r"count: expected 0\.\.6 .*got -1", HF.masked_batch_norm, X, COUNT - 5),
    (r"weight: expected \[C\] = \[3\] on cpu, got \[2\]",
     HF.masked_batch_norm, X, COUNT, torch.ones(2)),
    ("bias: expected a float dtype", HF.masked_batch_norm, X, COUNT, None, TARGET[:3]),
    (r"bias: expected \[C\] = \[3\] on cpu, .*on meta",
     HF.masked_batch_norm, X, COUNT, None, torch.ones(3, device="meta")),
    ("running_mean, running_var: expected both or neither; give None for both",
     HF.masked_batch_norm, X, COUNT, None, None, torch.ones(3)),
    (r"running_var: expected \[C\] = \[3\]",
     HF.masked_batch_norm, X, COUNT, None, None, torch.ones(3), torch.ones(4)),
    ("running_mean: requires a gradient, but it is moved in place; detach it",
     HF.masked_batch_norm, X, COUNT, None, None, torch.ones(3).requires_grad_(), torch.ones(3)),
    (r"running_var: expected a contiguous vector, .* strides \(2,\); give a contiguous copy",
     HF.masked_batch_norm, X, COUNT, None, None, torch.ones(3), torch.ones(3, 2)[:, 0]),
    (r"momentum: expected a number in \[0, 1\] or None, got 1\.5",
     HF.masked_batch_norm, X, COUNT, *[None] * 4, 1.5),
    ("momentum: .*got nan", HF.masked_batch_norm, X, COUNT, *[None] * 4, float("nan")),
    (r"eps: expected a finite number above 0, got 0\.0",
     HF.masked_batch_norm, X, COUNT, *[None] * 4, 0.1, 0.0),
    ("eps: .*got nan", HF.masked_batch_norm, X, COUNT, *[None] * 4, 0.1, float("nan")),
    ("activation: .*relu, relu6, silu, hardswish, got 'gelu'; leave it out and apply your own",
     HF.masked_batch_norm, X, COUNT, *[None] * 4, 0.1, 1e-5, "gelu"),
    (r"residual: expected torch.float32 \[6, 3\] on cpu as x, got torch.float32 \[6, 4\]",
     HF.masked_batch_norm, X, COUNT, *[None] * 4, 0.1, 1e-5, None, GOOD),
    ("residual: .*got torch.float64",
     HF.masked_batch_norm, X, COUNT, *[None] * 4, 0.1, 1e-5, None, X.double()),
    ("backend: .*'cuda'",
     HF.masked_batch_norm, X, COUNT, *[None] * 4, 0.1, 1e-5, None, None, "cuda"),
    ("num_batches_tracked: expected an int64 scalar on cpu, got torch.int32",
     HF.masked_batch_norm, X, COUNT, *[None] * 4, 0.1, 1e-5, None, None, None, COUNT),
]  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS, ids=lambda call: call[0])
def test_bad_arguments_are_named(call):
    message, operation, *arguments = call
    with pytest.raises(ValueError, match=message):
        operation(*arguments)
