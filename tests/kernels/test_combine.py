"""combine against the loop over experts, under the interpreter or on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
from hubpath_fast.kernels.combine import combine
from support.operations import implementations
from support.output_cases import (
    ROUNDING,
    SMALL,
    SMALL_MAPS,
    Case,
    assert_within,
    concat_reference,
    double,
    every_case,
    float_dtypes,
    leaves,
    make,
    small_cases,
)


def check(inputs, ops) -> None:
    """Values and gradients within their roundings, with every element written."""
    dtype = inputs.outputs.dtype
    compute = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    outputs, weights = leaves(inputs.outputs, inputs.weights)
    concat = ops.combine(outputs, weights, inputs)
    gradients = torch.autograd.grad(concat, (outputs, weights), inputs.d_concat)

    exact = double(outputs, weights)
    expected = concat_reference(*exact, inputs)
    wanted = torch.autograd.grad(expected, exact, inputs.d_concat.double())
    # One product, rounded to float32 and then to the dtype; zeros are exact.
    relative = compute + ROUNDING[dtype] * (1 + compute)
    assert concat.dtype == dtype
    assert_within(concat, expected, relative * expected.abs(), "concat")
    assert_within(gradients[0], wanted[0], relative * wanted[0].abs(), "d_outputs")
    # A sum of C*S products: as many roundings at most, each relative to sum |terms|.
    absolute = double(outputs, weights, absolute=True)
    terms = torch.autograd.grad(
        concat_reference(*absolute, inputs), absolute[1], inputs.d_concat.double().abs()
    )[0]
    length = inputs.outputs[0].numel()
    assert gradients[1].dtype == weights.dtype
    assert_within(gradients[1], wanted[1], (length + 1) * compute * terms, "d_weights")


@implementations
@every_case
def test_matches_the_loop_in_float64(case, ops, device):
    check(make(case, torch.float64, device), ops)


@implementations
@float_dtypes
@small_cases
def test_rounds_once(case, dtype, ops, device):
    check(make(case, dtype, device), ops)


@pytest.mark.parametrize("c", [16, 100])
def test_channels_last_stays_channels_last(c, device):
    case = Case("", n=3, m=3, c=c, trailing=(2, 2), channels_last=True)
    inputs = make(case, torch.float32, device)
    outputs = inputs.outputs.requires_grad_()
    concat = combine(outputs, inputs.weights, inputs)
    assert concat.is_contiguous(memory_format=torch.channels_last)
    concat.sum().backward()
    assert outputs.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_strided_input_and_an_expanded_gradient_are_read_right(device):
    inputs = make(SMALL_MAPS, torch.float64, device)
    outputs = inputs.outputs.transpose(2, 3)  # neither contiguous nor channels last
    strided, weights = leaves(outputs, inputs.weights)
    combine(strided, weights, inputs).sum().backward()  # a gradient of stride 0
    exact = double(outputs, inputs.weights)
    concat_reference(*exact, inputs).sum().backward()
    assert_within(strided.grad, exact[0].grad, 1e-15, "d_outputs")
    assert_within(weights.grad, exact[1].grad, 1e-14, "d_weights")


def test_weights_are_not_rounded_to_the_outputs_dtype(device):
    inputs = make(SMALL, torch.float16, device)
    outputs = torch.ones_like(inputs.outputs)
    weights = torch.full_like(inputs.weights, 1 / 3)
    concat = combine(outputs, weights, inputs)
    assert set(concat.unique().tolist()) == {0.0, torch.tensor(1 / 3).half().item()}
    concat = combine(outputs * 3, weights, inputs)  # 3 * half(1/3) would be 0.99976
    assert concat.max().item() == 1.0


def test_under_autocast_nothing_is_cast(device):
    inputs = make(SMALL, torch.bfloat16, device)
    plain = combine(inputs.outputs, inputs.weights, inputs)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        concat = combine(inputs.outputs, inputs.weights, inputs)
    assert concat.dtype == torch.bfloat16
    assert torch.equal(concat, plain)
