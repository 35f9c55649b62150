"""The torch implementation of the contract's operations against the reference, in float64.

1e-10 everywhere: both sides do the same few float64 operations (unit roundoff 1.1e-16) in another
order over at most 64*37 terms of size about one; only a wrong formula can differ by more.
"""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from hubpath_fast import _torch_ops, reference
from hubpath_fast import functional as HF

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def scores(n, m, seed=0, noise_scale=1.0):
    random = torch.Generator().manual_seed(seed)
    clean, noise, eps = torch.randn(3, n, m, dtype=torch.float64, generator=random)
    return clean.requires_grad_(), (noise * noise_scale).detach().requires_grad_(), eps


def rows_of(routing, c, trailing=(), seed=1):
    random = torch.Generator().manual_seed(seed)
    shape = (routing.num_samples * routing.k, c, *trailing)
    return torch.randn(shape, dtype=torch.float64, generator=random).requires_grad_()


def reference_concat(outputs, routing):
    """The masked loop of the reference model, on given outputs [R, C, ...]."""
    parts, start = [], 0
    for i, count in enumerate(routing.counts()):
        active = routing.experts == i
        part = outputs.new_zeros(routing.num_samples, *outputs.shape[1:])
        w = routing.weights[active].view(-1, *[1] * (outputs.dim() - 1))
        part[active.any(dim=1)] = w * outputs[start : start + count]
        start += count
        parts.append(part)
    return torch.cat(parts, dim=1)


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


@pytest.mark.parametrize("noise_scale", [100.0, -100.0], ids=["huge noise", "hardly any noise"])
def test_extreme_noise_scales(noise_scale):
    clean, noise, eps = scores(31, 7, seed=3)
    noise = torch.full_like(noise, noise_scale).requires_grad_()
    routing = HF.noisy_topk(clean, noise, 3, eps)
    assert_same_routing(routing, reference.noisy_topk(clean, noise, 3, eps))
    grads = torch.autograd.grad(HF.exploration_loss(routing.mean), (clean, noise))
    assert all(g.isfinite().all() for g in grads)


def test_ties_go_to_the_lowest_index():
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    routing = HF.noisy_topk(zeros, zeros, 3)
    assert routing.experts.tolist() == [[0, 1, 2]] * 4
    assert routing.counts() == [4, 4, 4, 0, 0, 0]
    assert routing.rows.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    torch.testing.assert_close(routing.weights, torch.full((4, 3), 1 / 6, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores_still_choose_distinct_experts_in_range(bad):
    clean = torch.randn(5, 4)
    clean[2] = bad
    clean[3, 1] = bad
    experts = HF.noisy_topk(clean, torch.zeros(5, 4), 3).experts
    assert experts.min() >= 0
    assert experts.max() < 4
    assert all(len(set(row)) == 3 for row in experts.tolist())


def test_all_rows_to_one_expert_and_none_to_another():
    clean = torch.tensor([[0.0, 9.0, -9.0]], dtype=torch.float64).repeat(10, 1)
    routing = HF.noisy_topk(clean, torch.zeros_like(clean), 1)
    assert routing.counts() == [0, 10, 0]
    assert routing.offsets.tolist() == [0, 0, 10, 10]
    outputs = rows_of(routing, 4)
    torch.testing.assert_close(
        HF.combine(outputs, routing), reference_concat(outputs, routing), **CLOSE
    )


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
def test_low_precision_scores_are_routed_in_float32(dtype):
    clean = torch.randn(16, 5).to(dtype)
    noise, eps = torch.randn(16, 5).to(dtype), torch.randn(16, 5)
    routing = HF.noisy_topk(clean, noise, 2, eps)
    same = HF.noisy_topk(clean.float(), noise.float(), 2, eps)
    assert routing.weights.dtype == routing.mean.dtype == torch.float32
    assert torch.equal(routing.weights, same.weights)


def test_draw_takes_its_noise_from_torchs_generator():
    clean, noise = torch.randn(8, 5), torch.randn(8, 5)
    torch.manual_seed(11)
    drawn = HF.noisy_topk(clean, noise, 2, "draw")
    torch.manual_seed(11)
    given_eps = HF.noisy_topk(clean, noise, 2, torch.randn(8, 5))
    assert torch.equal(drawn.weights, given_eps.weights)


@given(sizes=sizes(), trailing=st.sampled_from([(), (3,), (3, 2)]), c=st.sampled_from([1, 10, 37]))
@settings(max_examples=25, deadline=None)
def test_combine_and_aggregate_equal_the_masked_loop(sizes, trailing, c):
    n, m, k = sizes
    results = []
    matrix = torch.randn(4, m * c, dtype=torch.float64).requires_grad_()
    bias = torch.randn(4, dtype=torch.float64).requires_grad_()
    for ours in (True, False):
        clean, noise, eps = scores(n, m)
        routing = HF.noisy_topk(clean, noise, k, eps)
        outputs = rows_of(routing, c, trailing)
        concat = (HF.combine if ours else reference_concat)(outputs, routing)
        if ours:
            y = HF.aggregate(outputs, routing, matrix, bias)
        else:
            y = F.linear(concat.movedim(1, -1), matrix, bias).movedim(-1, 1)
        loss = (concat**2).mean() + y.sin().sum()
        grads = torch.autograd.grad(loss, (outputs, clean, noise, matrix, bias))
        results.append((concat, y, *grads))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, **CLOSE)


def test_the_grouped_product_is_chosen_where_it_saves_enough():
    def preferred(n, m, k, c):
        return _torch_ops.prefer_grouped(torch.empty(n * k, c), torch.empty(c, m * c), k)

    assert not preferred(48, 5, 2, 10)
    assert preferred(512, 16, 2, 1000)
    assert preferred(512, 16, 2, 1001)  # no alignment is asked for
    assert not preferred(4096, 4, 4, 100)  # K = M: nothing to save
    assert [preferred(n, 64, 2, 100) for n in (1, 16, 256, 4096)] == [False, False, True, True]


@pytest.mark.parametrize("trailing", [(), (2, 3)], ids=["rows", "maps"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", [(9, 6, 2), (1, 3, 1), (5, 4, 4)], ids=str)
def test_the_grouped_aggregate_equals_the_dense_one(sizes, bias, trailing):
    n, m, k = sizes
    clean, noise, eps = scores(n, m)
    clean.data[:, 1] -= 100  # an expert without rows: its block's gradient is zero
    results = []
    for form in (True, False):
        routing = HF.noisy_topk(clean, noise, k, eps)
        outputs = rows_of(routing, 5, trailing)
        random = torch.Generator().manual_seed(2)
        matrix = torch.randn(7, m * 5, dtype=torch.float64, generator=random).requires_grad_()
        b = torch.ones(7, dtype=torch.float64, requires_grad=True) if bias else None
        y = _torch_ops.aggregate(outputs, routing.weights, routing, matrix, b, grouped=form)
        leaves = [outputs, clean, matrix, *([b] if bias else [])]
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for grouped, dense in zip(*results, strict=True):
        torch.testing.assert_close(grouped, dense, **CLOSE)


def test_the_grouped_aggregate_computes_only_the_gradients_asked_for():
    routing = HF.noisy_topk(*(t.detach() for t in scores(6, 3)[:2]), 2)
    outputs, matrix = rows_of(routing, 4), torch.ones(4, 12, dtype=torch.float64)
    y = _torch_ops.aggregate(outputs, routing.weights, routing, matrix, None, grouped=True)
    (found,) = torch.autograd.grad(y.sum(), outputs)
    w = routing.weights.flatten()[routing.rows]  # d y.sum() / d outputs[r, c] = w * C_OUT ones
    torch.testing.assert_close(found, (4 * w)[:, None].expand(-1, 4), **CLOSE)


def test_the_grouped_aggregate_compiles_without_a_break():
    """float32: 1e-4 of sums of 64 products of size one (roundoff 6e-8 times a few hundred)."""
    routing = HF.noisy_topk(*(t.float().detach() for t in scores(40, 16)[:2]), 2)
    outputs = rows_of(routing, 64).float().detach().requires_grad_()
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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_gather_scales_each_row_for_its_expert(dtype, memory_format):
    clean, noise, eps = scores(9, 5)
    routing = HF.noisy_topk(clean, noise, 2, eps)
    x = torch.randint(0, 256, (9, 3, 4, 6)).to(dtype)
    scale, shift = torch.rand(5, 3), torch.randn(5, 3)
    rows = HF.gather(x, routing, scale, shift, memory_format=memory_format)
    assert rows.is_contiguous(memory_format=memory_format)
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for n in range(9):
        for j in range(2):
            i = routing.experts[n, j]
            expected = x[n].to(rows.dtype) * scale[i, :, None, None] + shift[i, :, None, None]
            # one product and one sum: two roundings of values below 256
            torch.testing.assert_close(
                rows[routing.positions[n, j]], expected.to(rows.dtype), rtol=3e-7, atol=1e-6
            )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_gather_into_gives_each_expert_a_buffer_of_its_own(dtype, memory_format):
    routing = routed()
    x = torch.arange(6 * 3 * 4).reshape(6, 3, 2, 2).to(dtype)
    scale, shift = torch.rand(4, 3), torch.rand(4, 3)
    rows = HF.gather(x, routing, scale, shift, memory_format=memory_format)
    out = torch.full((4 * 8, 3, 2, 2), -1.0).contiguous(memory_format=memory_format)
    assert HF.gather_into(out, x, routing, scale, shift) is None
    for expert, own in enumerate(rows.split(routing.counts())):
        part = out[expert * 8 : (expert + 1) * 8]
        assert torch.equal(part[: len(own)], own)
        assert (part[len(own) :] == -1).all()


def test_gather_keeps_dtype_and_layout_and_sums_gradients():
    clean, noise, eps = scores(6, 4)
    routing = HF.noisy_topk(clean, noise, 3, eps)
    x = torch.randn(6, 2, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    rows = HF.gather(x, routing)
    assert rows.is_contiguous(memory_format=torch.channels_last)
    rows.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert HF.gather(torch.arange(6, dtype=torch.uint8), routing).dtype == torch.uint8
    assert HF.gather(x.detach(), routing, dtype=torch.bfloat16).dtype == torch.bfloat16


@given(sizes=sizes(), smoothing=st.sampled_from([0.0, 0.1]), trailing=st.sampled_from([(), (3,)]))
@settings(max_examples=20, deadline=None)
def test_exploit_loss_equals_the_loop_over_experts(sizes, smoothing, trailing):
    n, m, k = sizes
    clean, noise, eps = scores(n, m)
    routing = HF.noisy_topk(clean, noise, k, eps)
    outputs = rows_of(routing, 5, trailing)
    target = torch.randint(0, 5, (n, *trailing))
    target[0] = -100
    loss = HF.exploit_loss(outputs, routing, target, label_smoothing=smoothing)
    truth, start = 0.0, 0
    for i, count in enumerate(routing.counts()):
        samples = (routing.experts == i).any(dim=1)
        per_row = F.cross_entropy(
            outputs[start : start + count], target[samples], reduction="none",
            label_smoothing=smoothing,
        )  # fmt: skip
        truth = truth + per_row.flatten(1).mean(dim=1).sum() if trailing else truth + per_row.sum()
        start += count
    torch.testing.assert_close(loss, truth / n, **CLOSE)
    assert loss.dtype == torch.float64
    ours, expected = (torch.autograd.grad(v, outputs, retain_graph=True)[0] for v in (loss, truth))
    torch.testing.assert_close(ours, expected / n, **CLOSE)


def test_exploration_loss_is_minus_the_entropy():
    assert HF.exploration_loss(torch.tensor([0.5, 0.5])).item() == pytest.approx(
        -0.693147, abs=1e-6
    )
    mean = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    loss = HF.exploration_loss(mean)
    loss.backward()
    assert loss.item() == 0
    assert mean.grad.isfinite().all()


def test_counts_reads_the_host_once(monkeypatch):
    clean, noise, _ = scores(12, 4)
    routing = HF.noisy_topk(clean, noise, 2)
    first = routing.counts()
    routing.offsets = None  # a second read would fail
    assert routing.counts() == first
    assert sum(first) == 24


def test_no_operation_reads_values_back(monkeypatch):
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
    routing = HF.noisy_topk(*(t.float().detach().to(device) for t in scores(9, 4)[:2]), 2)
    outputs = rows_of(routing, 6).float().detach().to(device).requires_grad_()
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


GOOD = torch.zeros(6, 4)


def routed():
    return HF.noisy_topk(GOOD, GOOD, 2)


BAD_CALLS = {
    "k too large": (lambda: HF.noisy_topk(GOOD, GOOD, 5), r"k: .*1\.\.4.*got 5"),
    "k zero": (lambda: HF.noisy_topk(GOOD, GOOD, 0), r"k: .*got 0"),
    "k a float": (lambda: HF.noisy_topk(GOOD, GOOD, 2.0), r"k: .*integer.*got 2\.0"),
    "empty batch": (lambda: HF.noisy_topk(GOOD[:0], GOOD[:0], 1), "clean: empty batch"),
    "scores of one dimension": (lambda: HF.noisy_topk(GOOD[0], GOOD[0], 1), r"clean: .*\[N, M\]"),
    "integer scores": (lambda: HF.noisy_topk(GOOD.int(), GOOD.int(), 1), "clean: .*int32"),
    "noise of another width": (lambda: HF.noisy_topk(GOOD, GOOD[:, :3], 1), r"noise: .*\[6, 3\]"),
    "eps of another shape": (lambda: HF.noisy_topk(GOOD, GOOD, 1, GOOD[:2]), r"eps: .*\[2, 4\]"),
    "eps a word": (lambda: HF.noisy_topk(GOOD, GOOD, 1, "yes"), "eps: .*'yes'"),
    "unknown backend": (lambda: HF.noisy_topk(GOOD, GOOD, 1, backend="cuda"), "backend: .*'cuda'"),
    "buffers for fewer": (
        lambda: HF.gather_into(torch.zeros(20, 3), torch.zeros(6, 3), routed()),
        r"out: expected \[4 \* capacity, .* at least N=6, got shape \[20, 3\]",
    ),
    "buffers of another shape": (
        lambda: HF.gather_into(torch.zeros(24, 4), torch.zeros(6, 3), routed()),
        r"rows of \[3\]",
    ),
    "buffers with gaps": (
        lambda: HF.gather_into(torch.zeros(24, 6)[:, ::2], torch.zeros(6, 3), routed()),
        r"out: expected a contiguous .* strides \(6, 2\)",
    ),
    "buffers of another dtype": (
        lambda: HF.gather_into(torch.zeros(24, 3).int(), torch.zeros(6, 3), routed()),
        "int32",
    ),
    "buffers and a gradient": (
        lambda: HF.gather_into(torch.zeros(24, 3), torch.zeros(6, 3).requires_grad_(), routed()),
        "x: requires a gradient",
    ),
    "another batch": (lambda: HF.gather(torch.zeros(5, 3), routed()), "x: expected 6 samples"),
    "integer images": (lambda: HF.gather(torch.zeros(6, 3).int(), routed()), "x: .*int32"),
    "scale of another width": (
        lambda: HF.gather(torch.zeros(6, 3), routed(), scale=torch.ones(4, 2)),
        r"scale: .*\[4, 3\].*\[4, 2\]",
    ),
    "channels_last vectors": (
        lambda: HF.gather(torch.zeros(6, 3), routed(), memory_format=torch.channels_last),
        "memory_format: channels_last needs",
    ),
    "outputs of another length": (
        lambda: HF.combine(torch.zeros(11, 3), routed()),
        r"outputs: .*12 rows.*\[11, 3\]",
    ),
    "outputs without C": (lambda: HF.combine(torch.zeros(12), routed()), r"outputs: .*\[R, C"),
    "matrix of another width": (
        lambda: HF.aggregate(torch.zeros(12, 3), routed(), torch.zeros(3, 11), None),
        r"weight: .*12.*\[3, 11\]",
    ),
    "matrix of another dtype": (
        lambda: HF.aggregate(torch.zeros(12, 3), routed(), torch.zeros(3, 12).double(), None),
        "weight: expected torch.float32 as outputs, got torch.float64",
    ),
    "bias of another length": (
        lambda: HF.aggregate(torch.zeros(12, 3), routed(), torch.zeros(3, 12), torch.zeros(2)),
        r"bias: expected \[3\]",
    ),
    "targets of another length": (
        lambda: HF.exploit_loss(torch.zeros(12, 3), routed(), torch.zeros(5).long()),
        r"target: expected shape \[6\]",
    ),
    "float targets": (
        lambda: HF.exploit_loss(torch.zeros(12, 3), routed(), torch.zeros(6)),
        "target: .*int64.*float32",
    ),
    "a class out of range": (
        lambda: HF.exploit_loss(torch.zeros(12, 3), routed(), torch.full((6,), 3)),
        r"target: class 3 .*0\.\.2",
    ),
    "smoothing above one": (
        lambda: HF.exploit_loss(torch.zeros(12, 3), routed(), torch.zeros(6).long(), 1.5),
        "label_smoothing: .*1.5",
    ),
    "an ignored class that is no integer": (
        lambda: HF.exploit_loss(torch.zeros(12, 3), routed(), torch.zeros(6).long(), 0.0, -100.0),
        r"ignore_index: expected an integer, got -100\.0",
    ),
    "a matrix of means": (lambda: HF.exploration_loss(GOOD), "mean: expected a float vector"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_named(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()
