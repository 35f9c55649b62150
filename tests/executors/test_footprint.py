"""The bytes that autograd keeps of a run, on modules small enough to count them by hand."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

from hubpath_fast.executors.graphs.footprint import Footprint
from hubpath_fast.executors.torch_private import has_saved_tensors_hooks

FLOAT, BFLOAT = 4, 2


def kept(module, rows):
    with Footprint(module, rows) as footprint:
        output = module(rows)
    assert output is not None  # alive until here: so is what its backward needs
    return footprint.nbytes


def test_a_linear_layer_keeps_nothing_but_its_input():
    assert kept(nn.Linear(5, 3), torch.randn(7, 5)) == 0


def test_each_activation_counts_once_however_many_layers_keep_it():
    # The first linear's output feeds the ReLU, whose output both it and the second linear keep.
    net = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    assert kept(net, torch.randn(7, 5)) == 7 * 3 * FLOAT


def test_views_of_the_same_memory_count_once():
    class Twice(nn.Module):
        def forward(self, x):
            hidden = (x * self.scale).exp()
            return hidden[:, :2] * hidden[:, 1:3]

    net = Twice()
    net.scale = nn.Parameter(torch.ones(3))
    assert kept(net, torch.randn(7, 3)) == 7 * 3 * FLOAT


def test_batch_norm_keeps_its_input_and_the_statistics_of_the_batch():
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    rows = torch.randn(4, 2, 5, 5)
    assert kept(net, rows) == 4 * 3 * 5 * 5 * FLOAT + 2 * 3 * FLOAT
    assert kept(net.eval(), rows) == 4 * 3 * 5 * 5 * FLOAT  # its running statistics are buffers


def test_it_grows_with_the_rows():
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4), nn.Sigmoid())
    assert kept(net, torch.randn(6, 5)) == 6 * (3 + 4) * FLOAT
    assert kept(net, torch.randn(12, 5)) == 12 * (3 + 4) * FLOAT


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert kept(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), torch.randn(7, 5)) == 0


def test_nothing_is_kept_by_frozen_parts():
    net = nn.Sequential(nn.Linear(5, 3).requires_grad_(False), nn.Tanh(), nn.Linear(3, 4))
    assert kept(net, torch.randn(7, 5)) == 7 * 3 * FLOAT  # what the last layer reads


def test_what_was_dropped_within_the_run_does_not_count():
    class Wasteful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 100)

        def forward(self, x):
            self.unused(x).tanh()
            return self.used(x).tanh()

    assert kept(Wasteful(), torch.randn(7, 5)) == 7 * 3 * FLOAT


@pytest.mark.parametrize("frozen", [False, True])
def test_casts_of_parameters_do_not_count_under_autocast(frozen):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten())
    net.append(nn.Linear(4, 6))
    net[2].requires_grad_(not frozen)
    rows = torch.randn(7, 2, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = kept(net, rows)
    cast_rows, hidden, features = 7 * 2 * 5 * 5, 7 * 3 * 3 * 3, 7 * 4
    assert found == (cast_rows + hidden + features) * BFLOAT


def test_gradients_are_those_of_a_run_without_it():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 2)
    ).double()
    rows = torch.randn(4, 2, 5, 5, dtype=torch.float64)

    def gradients(around):
        rows_ = rows.clone().requires_grad_()
        with around(net, rows_):
            output = net(rows_)
        return torch.autograd.grad(output.square().sum(), [rows_, *net.parameters()])

    with_it = gradients(Footprint)
    without = gradients(lambda *_: contextlib.nullcontext())
    for a, b in zip(with_it, without, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_work():
    net, rows = nn.Linear(3, 1, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with Footprint(net, rows):
        output = net(rows).pow(3).sum()
    (first,) = torch.autograd.grad(output, net.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), net.weight)
    y = net(rows).detach()
    expected = 6 * (y * rows.sum(1, keepdim=True) * rows).sum(0, keepdim=True)
    torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-12)


def test_an_activation_that_is_overwritten_is_an_error_as_without_it():
    net, rows = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()), torch.randn(2, 3)
    with Footprint(net, rows):
        output = net(rows)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_memory_is_freed_with_the_output():
    net, rows = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()), torch.randn(2, 3)
    gc.disable()
    try:
        with Footprint(net, rows):
            output = net(rows)
        alive = weakref.ref(output)
        del output
        assert alive() is None  # no cycle keeps it
    finally:
        gc.enable()


def test_an_exception_passes_and_leaves_no_hooks():
    with pytest.raises(ZeroDivisionError), Footprint(nn.Linear(3, 4), torch.randn(2, 3)):
        raise ZeroDivisionError
    assert not has_saved_tensors_hooks()
