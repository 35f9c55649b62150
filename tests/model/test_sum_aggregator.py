"""The weighted sum of the experts' outputs, made of the rows alone."""

from __future__ import annotations

import pytest
import torch

import hubpath_fast as hp
from hubpath_fast import functional as HF

M, C, N = 5, 4, 17


def rows(k, shape=(), dtype=torch.float64):
    draw = torch.Generator().manual_seed(k)
    clean = torch.randn(N, M, generator=draw, dtype=torch.float64, requires_grad=True)
    routing = HF.noisy_topk(clean, torch.zeros(N, M, dtype=torch.float64), k)
    outputs = torch.randn(N * k, C, *shape, generator=draw, dtype=torch.float64).to(dtype)
    return clean, routing, outputs.requires_grad_()


@pytest.mark.parametrize(("k", "shape"), [(1, ()), (2, ()), (2, (3, 2)), (M, ())])
def test_rows_give_the_sum_of_the_concatenation_and_its_gradients(k, shape):
    clean, routing, outputs = rows(k, shape)
    aggregator = hp.SumAggregator(M, C)
    grad = torch.randn(N, C, *shape, dtype=torch.float64)
    found = aggregator.from_rows(outputs, routing)
    expected = aggregator(HF.combine(outputs, routing))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for mine, theirs in zip(
        torch.autograd.grad(found, (outputs, clean), grad, retain_graph=True),
        torch.autograd.grad(expected, (outputs, clean), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_half_precision_is_summed_in_float32_and_rounded_once():
    _, routing, outputs = rows(3, dtype=torch.bfloat16)
    found = hp.SumAggregator(M, C).from_rows(outputs, routing)
    exact = hp.SumAggregator(M, C).from_rows(outputs.double(), routing)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.float().bfloat16())


def test_slots_that_were_dropped_add_nothing():
    _, routing, outputs = rows(2)
    keep = torch.rand(N, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    kept = routing.keeping(keep)
    left = outputs.detach()[: kept.rows.numel()]
    found = hp.SumAggregator(M, C).from_rows(left, kept)
    expected = hp.SumAggregator(M, C)(HF.combine(left, kept))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
