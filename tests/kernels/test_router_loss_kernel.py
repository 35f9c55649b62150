"""router_loss, alone and in one node with combine and aggregate, against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hubpath_fast.kernels import (
    aggregate_with_exploit_loss,
    combine_with_exploit_loss,
    router_loss,
)
from support.operations import implementations
from support.output_cases import (
    ROUNDING,
    SMALL,
    Case,
    aggregate_reference,
    assert_within,
    concat_reference,
    double,
    every_case,
    float_dtypes,
    fused_cases,
    leaves,
    loss_reference,
    make,
    router_bounds,
    router_reference,
    small_cases,
)

from hubpath_fast import kernels

TAU = 0.4


def check(inputs, smoothing=0.1, ops=kernels, temperature=TAU) -> None:
    outputs, weights = leaves(inputs.outputs, inputs.weights)
    loss = ops.router_loss(outputs, weights, inputs, inputs.target, temperature, smoothing)
    gradient, none = torch.autograd.grad(loss * 2, (weights, outputs), allow_unused=True)
    assert none is None
    (exact,) = double(weights)
    expected = router_reference(outputs.double(), exact, inputs, temperature, smoothing)
    (wanted,) = torch.autograd.grad(expected * 2, exact)
    double_precision = torch.float64 in (outputs.dtype, weights.dtype)
    unit = ROUNDING[torch.float64 if double_precision else torch.float32]
    assert loss.dtype == (torch.float64 if double_precision else torch.float32)
    assert gradient.dtype == weights.dtype
    bound, gradient_bound = router_bounds(outputs, weights, temperature, unit)
    assert_within(loss, expected, bound, "loss")
    # The sum of q / w and 1 / sum w, each stored once.
    stored = ROUNDING[weights.dtype] * (wanted.abs() + 2 / inputs.num_samples)
    assert_within(gradient, wanted, 2 * gradient_bound + stored, "d_weights")


@implementations
@every_case
def test_matches_the_definition_in_float64(case, ops, device):
    check(make(case, torch.float64, device), ops=ops)


@small_cases
def test_without_smoothing(case, device):
    check(make(case, torch.float64, device), smoothing=0.0)


@implementations
@float_dtypes
@small_cases
def test_computes_in_float32(case, dtype, ops, device):
    inputs = make(case, dtype, device)
    check(replace(inputs, weights=inputs.weights.float()), ops=ops)


@pytest.mark.parametrize(
    ("n", "k"),
    [(9000, 2), (4097, 2), (2000, 5), (3, 40)],
    ids=["three programs", "a sample beyond one program", "K = 5 of 8 lanes", "K = 40"],
)
def test_many_samples_and_many_active_experts(n, k, device):
    check(make(Case("", n=n, m=max(k, 3), k=k, c=3, c_out=2), torch.float64, device))


def test_a_low_temperature_leaves_zeros_in_q_and_no_nan(device):
    """exp(-l / tau) underflows for all but the best row: 0 log 0 is 0."""
    inputs = make(SMALL, torch.float32, device)
    outputs, weights = leaves(50 * inputs.outputs, inputs.weights)
    loss = router_loss(outputs, weights, inputs, inputs.target, 1e-3)
    (gradient,) = torch.autograd.grad(loss, weights)
    losses = torch.nn.functional.cross_entropy(
        outputs.detach(), inputs.target[inputs.rows.long() // inputs.k], reduction="none"
    )[inputs.positions.long()]
    best = losses.argmin(1, keepdim=True)
    expected = -(weights.gather(1, best)[:, 0] / weights.sum(1)).log().mean()
    torch.testing.assert_close(loss, expected)
    assert gradient.isfinite().all()


@implementations
def test_a_weight_of_zero_counts_as_the_smallest_normal_number(ops, device):
    inputs = make(SMALL, torch.float32, device)
    weights = inputs.weights.clone()
    weights[:, 1] = 0
    loss = ops.router_loss(
        inputs.outputs * 0, weights.requires_grad_(), inputs, inputs.target, 1.0, 0.0
    )
    (gradient,) = torch.autograd.grad(loss, weights)
    tiny = torch.finfo(torch.float32).tiny
    w = weights[:, 0].detach()
    expected = (0.5 * (0.5 / (w / w)).log() + 0.5 * (0.5 / (tiny / w)).log()).mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert loss.isfinite()
    # of 0: no pull of its own; of the other: (1 / sum w - q / w) / N
    torch.testing.assert_close(gradient[:, 0], (1 / w - 0.5 / w) / len(w))
    torch.testing.assert_close(gradient[:, 1], 1 / w / len(w))


def test_a_row_that_is_no_number_shows(device):
    inputs = make(SMALL, torch.float32, device)
    inputs.outputs[3] = float("nan")
    assert router_loss(inputs.outputs, inputs.weights, inputs, inputs.target, 1.0).isnan()


def test_the_gradient_is_that_of_finite_differences(device):
    inputs = make(SMALL, torch.float64, device)

    def loss(weights):
        return router_loss(inputs.outputs, weights, inputs, inputs.target, TAU, 0.1)

    assert torch.autograd.gradcheck(loss, leaves(inputs.weights.clone()), fast_mode=True)


def test_ignored_targets_have_equal_losses(device):
    inputs = make(SMALL, torch.float64, device)
    inputs.target.fill_(-100)
    loss = router_loss(inputs.outputs, inputs.weights, inputs, inputs.target, TAU)
    r = inputs.weights / inputs.weights.sum(1, keepdim=True)
    expected = (0.5 * (0.5 / r).log()).sum(1).mean()
    torch.testing.assert_close(loss, expected)


@fused_cases
@pytest.mark.parametrize("form", ["combine", "grouped", "dense"])
def test_in_one_node(form, case, device):
    inputs = make(case, torch.float64, device)
    sources = inputs.sources[:2] if form == "combine" else inputs.sources
    tensors = leaves(*sources)
    asked = {"temperature": TAU}
    if form == "combine":
        results = combine_with_exploit_loss(*tensors, inputs, inputs.target, 0.1, **asked)
        linear, upstream = concat_reference, inputs.d_concat
    else:
        results = aggregate_with_exploit_loss(
            *tensors[:2], inputs, *tensors[2:], inputs.target, 0.1, grouped=form == "grouped",
            **asked,
        )  # fmt: skip
        linear, upstream = aggregate_reference, inputs.d_y
    exact = double(*tensors)
    expected = (
        linear(*exact, inputs),
        loss_reference(exact[0], inputs, 0.1),
        router_reference(*exact[:2], inputs, TAU, 0.1),
    )
    gradients, wanted = (
        torch.autograd.grad((r[0] * upstream).sum() + 3 * r[1] + 5 * r[2], leaves_)
        for r, leaves_ in ((results, tensors), (expected, exact))
    )
    for name, found, right in zip(("joined", "exploit", "router"), results, expected, strict=True):
        assert_within(found, right, 1e-12 * (1 + right.detach().abs().max()), name)
    names = ("d_outputs", "d_weights", "d_matrix", "d_bias")
    for name, found, right in zip(names, gradients, wanted, strict=False):
        assert_within(found, right, 1e-12 * (1 + right.abs().max()), name)


@pytest.mark.parametrize("form", ["combine", "aggregate"])
def test_the_other_results_are_those_without_it_to_the_bit(form, device):
    """And so are their gradients, where the router's loss is not asked for one."""
    inputs = make(SMALL, torch.float32, device)
    found = []
    for asked in ({}, {"temperature": TAU}):
        tensors = leaves(*inputs.sources)
        if form == "combine":
            results = combine_with_exploit_loss(*tensors[:2], inputs, inputs.target, 0.1, **asked)
        else:
            results = aggregate_with_exploit_loss(
                *tensors[:2], inputs, *tensors[2:], inputs.target, 0.1, grouped=True, **asked
            )
        joined, exploit = results[:2]
        gradients = torch.autograd.grad(joined.sum() + exploit, tensors, allow_unused=True)
        found.append([joined, exploit, *(g for g in gradients if g is not None)])
    assert all(map(torch.equal, *found))


def test_frozen_parts_get_no_gradient(device):
    inputs = make(SMALL, torch.float32, device)
    outputs, weights, matrix, bias = leaves(*inputs.sources)
    y, exploit, router = aggregate_with_exploit_loss(
        outputs, weights.detach(), inputs, matrix, bias, inputs.target, 0.1, grouped=True,
        temperature=TAU,
    )  # fmt: skip
    gradients = torch.autograd.grad(y.sum() + exploit + router, (outputs, matrix))
    assert all(gradient.isfinite().all() for gradient in gradients)
    alone = router_loss(outputs, weights, inputs, inputs.target, TAU, 0.1)
    torch.testing.assert_close(router, alone.detach(), check_stride=False)
