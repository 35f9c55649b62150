"""The supervision of the router: our addition, against autograd in the reference, in float64.

1e-10 as in test_functional.py: both sides do the same few operations in another order.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.graphs import assert_same
from support.pathway import CLOSE, MapExpert, assert_same_state, build

import hubpath_fast as hp
from hubpath_fast import functional as HF
from hubpath_fast import reference

N, M, K, C = 12, 5, 2, 7
WEIGHT, TAU = 0.6, 0.4


def probabilities(*shape):
    random = torch.Generator().manual_seed(3)
    return torch.randn(*shape, dtype=torch.float64, generator=random).softmax(dim=1)


def cross_entropy(prediction, y, smoothing=0.0):
    loss = F.cross_entropy(prediction, y, reduction="none", label_smoothing=smoothing)
    return loss if loss.dim() == 1 else loss.flatten(1).mean(1)


def squares(prediction, y):
    return (prediction.flatten(1) - y.double().view(len(y), -1).mean(1, True)).square().mean(1)


VECTORS, MAPS = {}, {"expert": MapExpert, "num_outputs": C}
classes = torch.randint(0, C, (N, 3, 2), generator=torch.Generator().manual_seed(1))
weights = torch.linspace(0, 2, N, dtype=torch.float64)
# model, targets, options of the criterion, weights of the samples
CASES = {
    "classes": (VECTORS, classes[:, 0, 0], {}, None),
    "smoothed": (VECTORS, classes[:, 0, 0], {"label_smoothing": 0.1}, None),
    "probabilities": (VECTORS, probabilities(N, C), {"label_smoothing": 0.1}, None),
    "maps": (MAPS, classes, {"label_smoothing": 0.1}, None),
    "maps of probabilities": (MAPS, probabilities(N, C, 3, 2), {}, None),
    "weighted samples": (VECTORS, classes[:, 0, 0], {"label_smoothing": 0.1}, weights),
    "weighted maps": (MAPS, classes, {}, weights),
    "another loss": (VECTORS, classes, {"task_loss": squares}, None),
    "another loss, weighted": (VECTORS, classes, {"task_loss": squares}, weights),
    "K = 3": ({"k": 3}, classes[:, 0, 0], {}, None),
    "K = M": ({"k": M}, classes[:, 0, 0], {}, None),
}


def models(options, renormalize=False):
    options = dict(options)
    ours, truth, x, _, eps = build(N, M, options.pop("k", K), **options)
    ours.renormalize = truth.renormalize = renormalize
    return ours, truth, x, eps


@pytest.mark.parametrize("renormalize", [False, True], ids=["", "renormalised"])
@pytest.mark.parametrize(
    ("case", "fused"),
    [
        (case, fused)
        for case in CASES
        for fused in (False, True)
        if not (fused and "task_loss" in CASES[case][2])
    ],
)
def test_a_step_equals_autograd_in_the_reference(case, fused, renormalize):
    options, y, asked, weight = CASES[case]
    ours, truth, x, eps = models(options, renormalize)
    criterion = hp.HubPathwayLoss(
        explore=0.7, router_supervision=WEIGHT, router_temperature=TAU, **asked
    )
    smoothing = criterion.label_smoothing
    more = {"target": y, "label_smoothing": smoothing, "router_temperature": TAU} if fused else {}
    out, expected = ours(x, eps, **more), truth(x, eps)
    losses = criterion(out, y, sample_weight=weight)
    if fused and weight is None:
        assert losses.router is out.fused_exploit.router(y, smoothing, TAU)
        assert losses.exploit is out.fused_exploit.loss(y, smoothing)

    loss = asked.get("task_loss") or partial(cross_entropy, smoothing=smoothing)
    total, *parts = reference.losses(expected, y, 0.7, loss, weight)
    router = reference.router_loss(expected, y, TAU, loss, weight)
    total = total + WEIGHT * router
    found = losses.total, losses.task, losses.explore, losses.exploit, losses.router
    torch.testing.assert_close(found, (total, *parts, router), **CLOSE)
    losses.total.backward()
    total.backward()
    assert_same_state(ours, truth)


def by_hand(outputs, routing, y, tau):
    """The definition, sample by sample and row by row."""
    total = 0.0
    for n, (w, rows) in enumerate(
        zip(routing.weights.tolist(), routing.positions.tolist(), strict=True)
    ):
        losses = [-outputs[row].log_softmax(0)[y[n]].item() for row in rows]
        q = torch.tensor([-loss / tau for loss in losses], dtype=torch.float64).softmax(0)
        r = torch.tensor(w, dtype=torch.float64) / sum(w)
        total += (q * (q / r).log()).sum().item()
    return total / len(y)


def routed(n=N, m=M, k=K, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, n, m, dtype=dtype, generator=random)
    routing = HF.noisy_topk(clean, noise, k)
    routing = replace(routing, weights=routing.weights.clone().requires_grad_())
    outputs = torch.randn(n * k, C, dtype=dtype, generator=random)
    return routing, outputs, torch.randint(C, (n,), generator=random)


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_the_value_is_the_definitions(tau):
    routing, outputs, y = routed(k=3)
    expected = by_hand(outputs, routing, y, tau)
    assert HF.router_loss(outputs, routing, y, tau).item() == pytest.approx(expected, rel=1e-12)
    out = reference.ReferenceOutput(None, outputs, routing)
    assert reference.router_loss(out, y, tau).item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    routing, outputs, y = routed(k=3)

    def loss(weights):
        return HF.router_loss(outputs, replace(routing, weights=weights), y, TAU, 0.1)

    assert torch.autograd.gradcheck(loss, routing.weights)


def test_weights_that_say_what_the_losses_say_cost_nothing():
    """r = q: the loss is 0 and so is its gradient through the softmax."""
    routing, outputs, y = routed()
    losses = F.cross_entropy(outputs, y[routing.rows.long() // K], reduction="none")
    q = (-losses[routing.positions.long()] / TAU).softmax(1)
    scores = q.log().requires_grad_()
    found = HF.router_loss(outputs, replace(routing, weights=0.3 * scores.softmax(1)), y, TAU)
    (gradient,) = torch.autograd.grad(found, scores)
    assert_same(
        {"loss": found, "gradient": gradient}, {"loss": found * 0, "gradient": q * 0}, **CLOSE
    )


def test_a_step_pulls_the_weights_towards_the_better_expert():
    routing, outputs, y = routed()
    (gradient,) = torch.autograd.grad(HF.router_loss(outputs, routing, y, 0.01), routing.weights)
    losses = F.cross_entropy(outputs, y[routing.rows.long() // K], reduction="none")
    best = losses[routing.positions.long()].argmin(1)
    assert torch.equal((-gradient).argmax(1), best)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("asked", [{}, {"task_loss": squares}], ids=["default", "another loss"])
def test_it_moves_only_the_generator(fused, asked):
    """Both of its heads; experts and aggregator get no gradient from it at all."""
    ours, _, x, y, eps = build(N, M, K)
    more = {"target": y, "router_temperature": 1.0} if fused else {}
    criterion = hp.HubPathwayLoss(router_supervision=1.0, **asked)
    criterion(ours(x, eps, **more), y).router.backward()
    moved = {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"generator.clean", "generator.noise"}


def test_off_it_is_zero_and_changes_no_bit():
    ours, _, x, y, eps = build(N, M, K)
    found = []
    for asked in ({}, {"router_supervision": 0.0, "router_temperature": 3.0}):
        model = copy.deepcopy(ours)
        losses = hp.HubPathwayLoss(explore=0.7, **asked)(model(x, eps, target=y), y)
        assert losses.router.item() == 0
        assert torch.equal(losses.total, losses.task + 0.7 * losses.explore + losses.exploit)
        losses.total.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_underflowed_leave_value_and_gradient_finite(dtype):
    clean = torch.tensor([[0.0, -2000.0, -2000.0]] * 4, dtype=dtype).requires_grad_()
    routing = HF.noisy_topk(clean, clean.detach(), 2)
    assert routing.weights[:, 1].eq(0).all()
    outputs = torch.zeros(8, C, dtype=dtype)
    loss = HF.router_loss(outputs, routing, torch.zeros(4, dtype=torch.int64))
    # q = (1/2, 1/2) against (1, tiny): what the smallest normal number is to the logarithm.
    tiny = torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64)
    expected = 0.5 * (torch.tensor(0.5).log() + torch.tensor(0.5).log() - tiny.log())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, clean)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_of_any_precision_are_taken_in_float32(dtype):
    routing, outputs, y = routed(dtype=torch.float32)
    outputs = outputs.to(dtype)
    loss = HF.router_loss(outputs, routing, y)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, HF.router_loss(outputs.float(), routing, y))


OTHERS = {
    "label smoothing": (lambda y: y, {"label_smoothing": 0.1}),
    "temperature": (lambda y: y, {"router_temperature": 2.0}),
    "other targets": (lambda y: (y + 1) % C, {}),
    "targets changed": (lambda y: y.add_(1).remainder_(C), {}),
    "another loss": (lambda y: y, {"task_loss": lambda p, y: p.square().sum(1)}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_loss_that_was_fused_for_something_else_is_not_taken(other):
    change, asked = OTHERS[other]
    ours, _, x, y, eps = build(N, M, K)
    out = ours(x, eps, target=y, router_temperature=1.0)
    criterion = hp.HubPathwayLoss(router_supervision=WEIGHT, **asked)
    y = change(y)
    found, expected = criterion(out, y), criterion(hp.PathwayOutput(*out), y)
    assert torch.equal(found.router, expected.router)
    assert torch.equal(found.total, expected.total)


def test_a_model_that_was_not_asked_to_fuse_it_leaves_it_to_the_criterion():
    ours, _, x, y, eps = build(N, M, K)
    out, criterion = ours(x, eps, target=y), hp.HubPathwayLoss(router_supervision=WEIGHT)
    assert torch.equal(criterion(out, y).router, HF.router_loss(out.expert_outputs, out.routing, y))


def test_a_compiled_loss_has_no_break_and_the_same_value():
    routing, outputs, y = routed()

    def loss(outputs, weights):
        return HF.router_loss(outputs, replace(routing, weights=weights), y, TAU, 0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for call in (loss, compiled):
        value = call(outputs, routing.weights)
        results.append((value, *torch.autograd.grad(value, routing.weights)))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_one_active_expert_leaves_nothing_to_compare():
    ours, _, x, y, eps = build(N, M, 1)
    message = r"k: expected at least 2 for the supervision of the router, got 1; .* nothing to comp"
    for call in (
        lambda: HF.router_loss(*ours(x, eps)[1:], y),
        lambda: ours(x, eps, target=y, router_temperature=1.0),
        lambda: hp.HubPathwayLoss(router_supervision=0.1)(ours(x, eps), y),
        lambda: hp.HubPathwayLoss(router_supervision=0.1)(ours(x, eps, target=y), y),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    losses = hp.HubPathwayLoss()(ours(x, eps, target=y), y)  # not supervised: as ever
    assert losses.router.item() == 0


@pytest.mark.parametrize(
    ("task_loss", "found"),
    [(lambda p, y: p.sum(), r"\[\]"), (lambda p, y: p.sum().item(), "a float")],
    ids=["a scalar", "a number"],
)
def test_a_loss_without_a_value_for_each_row_is_named(task_loss, found):
    ours, _, x, y, eps = build(N, M, K)
    criterion = hp.HubPathwayLoss(task_loss, router_supervision=0.1)
    message = rf"task_loss: expected one loss a sample, \[{N}\], got {found}; use reduction="
    with pytest.raises(ValueError, match=message):
        criterion(ours(x, eps), y)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"router_supervision": -1}, "router_supervision: expected a finite weight >= 0, got -1"),
        ({"router_supervision": float("nan")}, "router_supervision: .* got nan"),
        ({"router_temperature": 0}, "router_temperature: expected a finite number above 0, got 0"),
        ({"router_temperature": float("inf")}, "router_temperature: .* got inf"),
    ],
)
def test_wrong_weights_and_temperatures_are_named(asked, message):
    with pytest.raises(ValueError, match=message):
        hp.HubPathwayLoss(**asked)
    if "router_temperature" not in asked:
        return
    routing, outputs, y = routed()
    with pytest.raises(ValueError, match=r"^temperature: expected a finite number above 0"):
        HF.router_loss(outputs, routing, y, asked["router_temperature"])
    with pytest.raises(ValueError, match="router_temperature: expected a finite number above 0"):
        HF.combine_with_exploit_loss(
            outputs, routing, y, router_temperature=asked["router_temperature"]
        )


def test_the_criterion_says_what_it_supervises():
    assert "router" not in repr(hp.HubPathwayLoss())
    found = repr(hp.HubPathwayLoss(router_supervision=0.2, router_temperature=0.5))
    assert "router_supervision=0.2, router_temperature=0.5" in found
