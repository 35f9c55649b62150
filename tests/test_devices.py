"""The mode of a model and the number of threads, as found."""

import contextlib

import pytest
import torch
from torch import nn

from hubpath_fast.devices import MIN_PRODUCTS_FOR_THREADS, eval_mode, threads_for


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
