"""The mode of a model, the number of threads and the precision of float32, as found."""

import contextlib

import pytest
import torch
from torch import nn

from hubpath_fast.devices import MIN_PRODUCTS_FOR_THREADS, eval_mode, full_float32, threads_for


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
