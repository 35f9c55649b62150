"""The mode of a model, the number of threads, the precision of float32 and denormals, as found."""

import contextlib

import pytest
import torch
from torch import nn

from hubpath_fast.devices import (
    MIN_PRODUCTS_FOR_THREADS,
    eval_mode,
    flushed_denormals,
    full_float32,
    threads_for,
)


def test_each_module_gets_its_own_mode_back_after_an_error_too():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout())).train()
    model[0].eval()  # as a frozen norm in a model that trains
    with contextlib.suppress(IndexError), eval_mode(model):
        assert [m.training for m in model.modules()] == [False] * 4
        raise IndexError
    assert [m.training for m in model.modules()] == [True, False, True, True]


@pytest.mark.parametrize(
    ("products", "within"), [(MIN_PRODUCTS_FOR_THREADS - 1, 1), (MIN_PRODUCTS_FOR_THREADS, 2)]
)
def test_small_calls_have_one_thread_and_then_as_many_as_before(products, within):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(IndexError), threads_for(products):
            assert torch.get_num_threads() == within
            raise IndexError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("flushed", [False, True])
def test_denormals_are_zero_within_and_then_as_before(flushed):
    def doubled():
        return (torch.tensor([2**23 - 1], dtype=torch.int32).view(torch.float32) * 2).item()

    if not torch.set_flush_denormal(flushed):
        pytest.skip("this processor flushes no denormals")
    try:
        before = doubled()
        assert (before == 0) == flushed
        with contextlib.suppress(IndexError), flushed_denormals():
            assert doubled() == 0
            raise IndexError
        assert doubled() == before
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="this torch has no newer names of the flags"
)
def test_a_precision_that_was_set_by_its_newer_name_stays():
    """Of the older name torch then raises."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    matmul.allow_tf32 = True
    try:
        with pytest.raises(RuntimeError):
            torch.backends.cudnn.allow_tf32  # noqa: B018
        with contextlib.suppress(IndexError), full_float32():
            assert (conv.fp32_precision, matmul.allow_tf32) == ("ieee", False)
            raise IndexError
        assert (conv.fp32_precision, matmul.allow_tf32) == ("ieee", True)
    finally:
        conv.fp32_precision = before
        matmul.allow_tf32 = False
    assert torch.backends.cudnn.allow_tf32
