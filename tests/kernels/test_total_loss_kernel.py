"""total_loss against the definition: values, each gradient alone and all, and what gets none."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hubpath_fast.kernels import total_loss
from support.operations import implementations
from support.output_cases import float_dtypes, leaves
from support.total_losses import SIZES, WEIGHT, check, make

sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


@implementations
@sizes
def test_matches_the_definition_in_float64(size, ops, device):
    check(make(size, device=device), ops)


def test_programs_of_several_tiles(monkeypatch, device):
    """As above 1,024 programs: here 19 tiles for at most 4 of them."""
    monkeypatch.setattr(sys.modules[total_loss.__module__], "_PROGRAMS", 4)
    check(make(SIZES["two programs"], device=device))


def test_without_smoothing(device):
    check(make(SIZES["ragged"], device=device), smoothing=0.0)


@implementations
@float_dtypes
def test_computes_in_float32(dtype, ops, device):
    check(make(SIZES["ragged"], dtype, device), ops)
    check(make(SIZES["two programs"], dtype, device), ops)


@implementations
def test_without_an_exploit_loss(ops, device):
    prediction, target, mean, _ = make(SIZES["ragged"], device=device)
    tensors = leaves(prediction, mean)
    total, task, explore, _ = ops.total_loss(tensors[0], target, tensors[1], None, WEIGHT)
    torch.testing.assert_close(total, task + WEIGHT * explore, rtol=1e-14, atol=0)
    found = torch.autograd.grad(total, tensors, retain_graph=True)
    parts = torch.autograd.grad(task + WEIGHT * explore, tensors)
    torch.testing.assert_close(found, parts, rtol=1e-14, atol=0)


@implementations
def test_a_mean_that_is_no_number_shows(ops, device):
    prediction, target, mean, exploit = make(SIZES["ragged"], device=device)
    mean[1] = math.nan
    mean.requires_grad_()
    total, task, explore, _ = ops.total_loss(prediction, target, mean, exploit, WEIGHT)
    (gradient,) = torch.autograd.grad(total, mean)
    assert gradient.isnan().tolist() == mean.isnan().tolist()
    assert total.isnan()
    assert explore.isnan()
    assert task.isfinite()


def test_any_layout_is_read_as_it_reads(device):
    prediction, target, mean, exploit = make(SIZES["ragged"], device=device)
    spread = torch.stack([target, target], dim=1)[:, 0]
    found = total_loss(prediction.T.contiguous().T, spread, mean, exploit, WEIGHT)
    assert all(map(torch.equal, found, total_loss(prediction, target, mean, exploit, WEIGHT)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a device this is an assertion")
@pytest.mark.parametrize("wrong", [-1, 37, 2**40])
def test_a_class_out_of_range_is_no_address(wrong):
    prediction, target, mean, exploit = make(SIZES["ragged"])
    (x,) = leaves(prediction)
    found = total_loss(x, target, mean, exploit, WEIGHT)[3]
    (gradient,) = torch.autograd.grad(found.sum(), x)
    target[0] = wrong
    other = total_loss(x, target, mean, exploit, WEIGHT)[3]
    (other_gradient,) = torch.autograd.grad(other.sum(), x)
    assert other.isfinite().all()
    assert torch.equal(other[1:], found[1:])
    assert torch.equal(other_gradient[1:], gradient[1:])


@pytest.mark.parametrize(
    ("size", "forward"),
    [("the paper's", ["_total_loss"]), ("two programs", ["_total_loss", "_add_losses"])],
)
def test_launches(size, forward, launches, device):
    prediction, target, mean, exploit = make(SIZES[size], torch.float32, device)
    total = total_loss(prediction.requires_grad_(), target, mean, exploit, WEIGHT)[0]
    assert launches == forward
    del launches[:]
    total.backward()
    assert launches == ["_total_loss_backward"]
