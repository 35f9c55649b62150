"""The mode of a model, as found."""

import contextlib

from torch import nn

from hubpath_fast.devices import eval_mode


def test_each_module_gets_its_own_mode_back_after_an_error_too():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout())).train()
    model[0].eval()  # as a frozen norm in a model that trains
    with contextlib.suppress(IndexError), eval_mode(model):
        assert [m.training for m in model.modules()] == [False] * 4
        raise IndexError
    assert [m.training for m in model.modules()] == [True, False, True, True]
