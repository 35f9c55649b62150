"""aggregate in its grouped form, alone and with the exploit loss, against the loop over experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hubpath_fast.kernels import aggregate_with_exploit_loss
from hubpath_fast.kernels._aggregate_form import prefer_grouped
from hubpath_fast.kernels._grouped import product_constants
from hubpath_fast.kernels.aggregate import aggregate
from support.aggregate_check import NAMES, check
from support.output_cases import (
    SMALL,
    SMALL_LAST,
    SMALL_MAPS,
    Case,
    aggregate_reference,
    assert_within,
    double,
    every_case,
    float_dtypes,
    fused_cases,
    leaves,
    loss_reference,
    make,
    small_cases,
)

from hubpath_fast import _torch_ops


def grouped(tensors, inputs):
    outputs, weights, matrix, bias = tensors
    return aggregate(outputs, weights, inputs, matrix, bias, grouped=True)


def with_loss(tensors, inputs, smoothing=0.0, ignore_index=-100, grouped=True):
    outputs, weights, matrix, bias = tensors
    return aggregate_with_exploit_loss(
        outputs, weights, inputs, matrix, bias, inputs.target, smoothing, ignore_index,
        grouped,
    )  # fmt: skip


def in_torch(tensors, inputs, grouped):
    outputs, weights, matrix, bias = tensors
    return _torch_ops.aggregate(outputs, weights, inputs, matrix, bias, grouped)


@every_case
def test_matches_the_loop_in_float64(case, device):
    check(make(case, torch.float64, device), form=grouped)


@pytest.mark.parametrize("form", [True, False], ids=["grouped", "dense"])
@every_case
def test_torchs_forms_match_the_loop_in_float64(case, form):
    check(make(case, torch.float64), form=partial(in_torch, grouped=form))


@float_dtypes
@small_cases
def test_sums_in_float32_and_rounds_once(case, dtype, device):
    check(make(case, dtype, device), form=grouped)


@pytest.mark.parametrize("outputs", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_under_autocast_as_a_linear_layer(outputs, device):
    inputs = make(replace(SMALL, c=37), torch.float32, device)
    inputs.outputs = inputs.outputs.to(outputs)
    check(inputs, product=torch.bfloat16, autocast=True, form=grouped)


def test_few_experts_with_many_rows_are_cut_into_shares(device):
    """More than 512 rows per expert, few tiles: the matrix's gradient is added up from shares."""
    check(make(Case("", n=1040, m=1, k=1, c=3, c_out=2), torch.float64, device), form=grouped)


def test_without_a_bias(device):
    inputs = make(SMALL, torch.float64, device)
    tensors = leaves(*inputs.sources[:3])
    y = grouped((*tensors, None), inputs)
    gradients = torch.autograd.grad(y, tensors, inputs.d_y)
    exact = double(*tensors)
    expected = aggregate_reference(*exact, None, inputs)
    assert_within(y, expected, 1e-14, "y")
    for name, gradient, wanted in zip(
        NAMES, gradients, torch.autograd.grad(expected, exact, inputs.d_y), strict=False
    ):
        assert_within(gradient, wanted, 1e-14, name)


@pytest.mark.parametrize("frozen", range(4), ids=NAMES)
def test_gradients_that_nobody_asked_for_are_not_made(frozen, device):
    inputs = make(SMALL, torch.float64, device)
    tensors = leaves(*inputs.sources)
    tensors[frozen].requires_grad_(False)
    grouped(tensors, inputs).backward(inputs.d_y)
    exact = double(*inputs.sources)
    aggregate_reference(*exact, inputs).backward(inputs.d_y)
    assert tensors[frozen].grad is None
    for i in {0, 1, 2, 3} - {frozen}:
        assert_within(tensors[i].grad, exact[i].grad, 1e-14, NAMES[i])


@pytest.mark.parametrize(
    "case",
    [SMALL, SMALL_MAPS, SMALL_LAST, replace(SMALL, why="C=130: several tiles", c=130)],
    ids=lambda case: case.why,
)
def test_with_a_frozen_matrix_and_bias(case, device):
    """Then there is no launch for the matrix, which otherwise sums the weights' gradient."""
    inputs = make(case, torch.float64, device)
    outputs, weights = leaves(inputs.outputs, inputs.weights)
    y = grouped((outputs, weights, inputs.matrix, inputs.bias), inputs)
    gradients = torch.autograd.grad(y, (outputs, weights), inputs.d_y)
    exact = double(*inputs.sources)
    wanted = torch.autograd.grad(aggregate_reference(*exact, inputs), exact[:2], inputs.d_y)
    for name, gradient, right in zip(NAMES, gradients, wanted, strict=False):
        assert_within(gradient, right, 1e-13, name)


def test_the_forward_keeps_nothing_but_its_inputs(device):
    """Neither the products [R, C_OUT] nor anything else of the size of the outputs."""
    inputs = make(SMALL, torch.float32, device)
    tensors, kept = leaves(*inputs.sources), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grouped(tensors, inputs)
    given = {tensor.data_ptr() for tensor in (*tensors, *vars(inputs).values())}
    assert len(kept) == 6
    assert {tensor.data_ptr() for tensor in kept} <= given


@pytest.mark.parametrize("case", [SMALL, SMALL_MAPS, SMALL_LAST], ids=lambda case: case.why)
def test_the_dense_form_is_the_same_function(case, device):
    inputs = make(case, torch.float64, device)
    tensors, others = leaves(*inputs.sources), leaves(*inputs.sources)
    dense = aggregate(others[0], others[1], inputs, *others[2:], grouped=False)
    sparse = grouped(tensors, inputs)
    assert dense.stride() == sparse.stride()
    assert_within(sparse, dense, 1e-14, "y")
    gradients = torch.autograd.grad(dense, others, inputs.d_y)
    for name, a, b in zip(
        NAMES, torch.autograd.grad(sparse, tensors, inputs.d_y), gradients, strict=True
    ):
        assert_within(a, b, 1e-13, name)


def test_tf32_only_where_torch_allows_it():
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for allow, expected in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allow
            assert product_constants(torch.float32)["PRECISION"] == expected
            assert product_constants(torch.float64)["PRECISION"] == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_prefer_grouped():
    assert prefer_grouped(4096, 64, 2, 1000, 1000, itemsize=2)  # 1/32 of the concatenation is used
    assert prefer_grouped(512, 16, 2, 1000, 1000, itemsize=4)
    assert not prefer_grouped(4096, 4, 4, 1000, 1000, itemsize=4)  # K = M: nothing to save
    sizes = [prefer_grouped(n, 64, 2, 100, 100, itemsize=4) for n in (1, 16, 256, 4096)]
    assert sizes == sorted(sizes)  # once it pays, it pays for more samples


@fused_cases
def test_in_one_node_with_the_exploit_loss(case, device):
    inputs = make(case, torch.float64, device)
    inputs.target.view(-1)[0] = -100
    tensors, exact = leaves(*inputs.sources), double(*inputs.sources)
    y, loss = with_loss(tensors, inputs, 0.1)
    gradients = torch.autograd.grad((y * inputs.d_y).sum() + 3 * loss, tensors)
    expected, wanted_loss = (
        aggregate_reference(*exact, inputs),
        loss_reference(exact[0], inputs, 0.1),
    )
    wanted = torch.autograd.grad((expected * inputs.d_y).sum() + 3 * wanted_loss, exact)
    assert_within(y, expected, 1e-13, "y")
    assert_within(loss, wanted_loss, 1e-13, "loss")
    for i, name in enumerate(NAMES):
        assert_within(gradients[i], wanted[i], 1e-13 * (1 + wanted[i].abs().max()), name)


def test_with_the_loss_both_forms_agree(device):
    inputs = make(SMALL_MAPS, torch.float64, device)
    results = []
    for form in (True, False):
        tensors = leaves(*inputs.sources)
        y, loss = with_loss(tensors, inputs, 0.1, grouped=form)
        results.append((y, loss, *torch.autograd.grad((y * inputs.d_y).sum() + loss, tensors)))
    for name, a, b in zip(("y", "loss", *NAMES), *results, strict=True):
        assert_within(a, b, 1e-13, name)
