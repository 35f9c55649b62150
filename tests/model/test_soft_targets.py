"""Class probabilities as targets, as mixup and cutmix have them: in every loss what
``F.cross_entropy`` says of each row, in float64, gradients too."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.pathway import CLOSE, MapExpert, assert_equal_step, build

import hubpath_fast as hp
from hubpath_fast import _backends, _torch_ops, reference
from hubpath_fast import functional as HF

N, M, K, C = 12, 5, 2, 7


def probabilities(*shape, dtype=torch.float64):
    random = torch.Generator().manual_seed(3)
    return torch.randn(*shape, dtype=torch.float64, generator=random).softmax(dim=1).to(dtype)


def routed(tail=()):
    random = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, N, M, dtype=torch.float64, generator=random)
    routing = HF.noisy_topk(clean, noise, K)
    outputs = torch.randn(N * K, C, *tail, dtype=torch.float64, generator=random)
    return routing, outputs.requires_grad_()


def by_rows(outputs, routing, target, smoothing):
    """Equation 5 as it is written: each row's own cross-entropy, a mean over a map's positions."""
    total = 0
    for row, slot in zip(outputs, routing.rows.tolist(), strict=True):
        y = target[slot // K].to(row)
        smooth = (1 - smoothing) * y + smoothing / C
        total = total - (smooth * row.log_softmax(dim=0)).sum(dim=0).mean()
    return total / N


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tail", [(), (4,), (3, 2)], ids=["vectors", "sequences", "maps"])
def test_the_exploit_loss_is_each_rows_cross_entropy(tail, smoothing):
    routing, outputs = routed(tail)
    target = probabilities(N, C, *tail)
    expected = by_rows(outputs, routing, target, smoothing)
    (wanted,) = torch.autograd.grad(expected, outputs)
    weight = torch.randn(C, M * C, dtype=torch.float64)
    calls = {
        "alone": lambda: HF.exploit_loss(outputs, routing, target, smoothing),
        "combined": lambda: HF.combine_with_exploit_loss(outputs, routing, target, smoothing)[1],
        "aggregated": lambda: HF.aggregate_with_exploit_loss(
            outputs, routing, weight, None, target, smoothing
        )[1],
    }
    for name, call in calls.items():
        loss = call()
        torch.testing.assert_close(loss, expected, msg=name, **CLOSE)
        (found,) = torch.autograd.grad(loss, outputs)
        torch.testing.assert_close(found, wanted, msg=name, **CLOSE)
    concat, _ = HF.combine_with_exploit_loss(outputs, routing, target)
    assert torch.equal(concat, HF.combine(outputs, routing))
    y, _ = HF.aggregate_with_exploit_loss(outputs, routing, weight, None, target)
    assert torch.equal(y, HF.aggregate(outputs, routing, weight, None))


@pytest.mark.parametrize("tail", [(), (3, 2)])
def test_certain_probabilities_are_classes(tail):
    routing, outputs = routed(tail)
    classes = torch.randint(C, (N, *tail), generator=torch.Generator().manual_seed(1))
    certain = F.one_hot(classes, C).movedim(-1, 1).double()
    for smoothing in (0.0, 0.2):
        results = []
        for target in (classes, certain):
            loss = HF.exploit_loss(outputs, routing, target, smoothing)
            results.append((loss, *torch.autograd.grad(loss, outputs)))
        torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_sums_other_than_one_and_zero_rows_are_taken_as_torch_takes_them():
    routing, outputs = routed()
    target = 3 * probabilities(N, C)
    target[0] = 0
    found = HF.exploit_loss(outputs, routing, target)
    torch.testing.assert_close(found, by_rows(outputs, routing, target, 0.0), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_targets_of_any_precision_count_in_the_losses_own(dtype):
    """Smoothing is added in the loss's precision, not in the target's: the only rounding is that
    of the targets that came."""
    ours, _, x, _, eps = build(N, M, K)
    y = probabilities(N, C, dtype=dtype)
    out = ours(x, eps)
    criterion = hp.HubPathwayLoss(label_smoothing=0.1)
    found, expected = criterion(out, y), criterion(out, y.double())
    torch.testing.assert_close(found.total, expected.total, **CLOSE)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("aggregator", ["linear", "sum", "mlp"])
def test_a_step_on_probabilities_equals_the_reference(aggregator, fused):
    ours, _, x, _, eps = build(N, M, K)
    ours.aggregator = hp.model.make_aggregator(aggregator, M, C).double()
    parts = copy.deepcopy((list(ours.experts), ours.generator, ours.aggregator))
    truth, y = reference.ReferenceHubPathway(*parts, k=K), probabilities(N, C)
    assert_equal_step(ours, truth, x, y, eps, fused)


def test_sample_weights_scale_losses_on_probabilities():
    ours, truth, x, _, eps = build(N, M, K)
    y, weight = probabilities(N, C), torch.rand(N, dtype=torch.float64)
    losses = hp.HubPathwayLoss()(ours(x, eps), y, sample_weight=weight)
    total, *_ = reference.losses(truth(x, eps), y, 0.5, sample_weight=weight)
    torch.testing.assert_close(losses.total, total, **CLOSE)


def test_maps_of_probabilities_are_averaged_over_their_positions():
    ours, _, x, _, eps = build(N, 3, K, expert=MapExpert, num_outputs=C)
    out, y = ours(x, eps), probabilities(N, C, 3, 2)
    task = F.cross_entropy(out.prediction, y, reduction="none").mean()
    losses = hp.HubPathwayLoss()(out, y)
    torch.testing.assert_close(losses.task, task, **CLOSE)
    exploit = by_rows(out.expert_outputs, out.routing, y, 0.0)
    torch.testing.assert_close(losses.exploit, exploit, **CLOSE)


def test_the_kernels_leave_the_loss_to_torch_and_keep_the_rest(monkeypatch, device):
    """Where Triton is the choice, as it is for CUDA tensors."""
    kernels = pytest.importorskip("hubpath_fast.kernels")
    (routing, outputs), target = routed(), probabilities(N, C).to(device)
    routing = HF.noisy_topk(*torch.randn(2, N, M, device=device), K)
    outputs, asked = outputs.detach().float().to(device), []

    def backend(name, x):
        asked.append(name)
        return _torch_ops if name == "torch" else kernels

    monkeypatch.setattr(_backends, "choose", backend)
    concat, loss = HF.combine_with_exploit_loss(outputs, routing, target)
    assert asked == ["torch", None]
    monkeypatch.undo()
    torch.testing.assert_close(concat, HF.combine(outputs, routing, "torch"))
    torch.testing.assert_close(loss, HF.exploit_loss(outputs, routing, target, backend="torch"))
    for call in (
        lambda: HF.exploit_loss(outputs, routing, target, backend="triton"),
        lambda: HF.combine_with_exploit_loss(outputs, routing, target, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r'"triton" has no loss against class prob.*"torch"'):
            call()


WRONG = {
    "one-hot integers": (
        lambda: F.one_hot(torch.zeros(N, dtype=torch.int64), C),
        r"one-hot torch.int64 take the classes, {name}\.argmax\(1\), or {name}\.float\(\)",
    ),
    "one-hot bools": (lambda: torch.eye(C, dtype=torch.bool)[[0] * N], "one-hot torch.bool"),
    "classes as floats": (lambda: torch.zeros(N), r"convert classes to int64, {name}\.long\(\)"),
    "too many classes": (
        lambda: probabilities(N, C + 1),
        rf"expected shape \[{N}\] of int64 classes, or \[{N}, {C}\] of float .*\[{N}, {C + 1}\]",
    ),
    "int32 classes": (lambda: torch.zeros(N).int(), r"torch.int32 .*int64, {name}\.long\(\)"),
    "uint8 classes": (lambda: torch.zeros(N).byte(), r"torch.uint8 .*int64, {name}\.long\(\)"),
    "numpy's": (lambda: np.zeros(N, np.int64), r"a ndarray; take torch.as_tensor\({name}\)"),
    "a list": (lambda: [0] * N, r"a list; take torch.as_tensor\({name}\)"),
    "a class too high": (
        lambda: torch.full((N,), C),
        rf"class {C} is out of range for {C} outputs; allowed are 0\.\.{C - 1}",
    ),
    "no class dimension": (lambda: torch.zeros(N, 1), "expected shape"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_targets_are_named(kind):
    make, message = WRONG[kind]
    routing, outputs = routed()
    with pytest.raises(ValueError, match="target: .*" + message.format(name="target")):
        HF.exploit_loss(outputs, routing, make())
    ours, _, x, _, eps = build(N, M, K)
    with pytest.raises(ValueError, match="y: .*" + message.format(name="y")):
        hp.HubPathwayLoss()(ours(x, eps), make())
    with pytest.raises(ValueError, match="target: .*" + message.format(name="target")):
        ours(x, eps, target=make())


def test_an_index_to_ignore_means_nothing_among_probabilities():
    routing, outputs = routed()
    with pytest.raises(
        ValueError, match=r"ignore_index: .* negative number with class prob.*got 0"
    ):
        HF.exploit_loss(outputs, routing, probabilities(N, C), ignore_index=0)
