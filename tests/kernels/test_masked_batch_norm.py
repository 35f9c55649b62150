"""masked_batch_norm against torch's BatchNorm on exactly the valid rows, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.norm_cases import (
    ACTIVATIONS,
    BATCHES,
    Case,
    assert_exact,
    assert_nothing_padded,
    laid_out,
    make,
    normalised,
    outcome,
    truth,
)
from torch import nn

from hubpath_fast import functional as HF

backends = pytest.mark.parametrize("backend", ["triton", "torch"])
two_layouts = pytest.mark.parametrize("layout", ["contiguous", "last"])
BLOCK = {"activation": "relu", "residual": True}  # as a ResNet's blocks end

SHAPES = [
    Case("the least: two rows of one value", n=2, capacity=2, c=1, trailing=()),
    Case("two of many rows", n=2, capacity=9, c=3, trailing=()),
    Case("rows of features", n=13, capacity=16, c=37, trailing=()),
    Case("more channels than a tile has, odd rows", n=3, capacity=4, c=208, trailing=()),
    Case("as many rows as channels", n=257, capacity=260, c=3, trailing=()),
    Case("a full buffer", n=6, capacity=6, c=8, trailing=(4, 4)),
    Case("a single channel", n=3, capacity=4, c=1, trailing=(7, 7)),
    Case("maps of one position", n=9, capacity=12, c=24, trailing=(1, 1)),
    Case("a ResNet's last maps, odd channels", n=3, capacity=4, c=37, trailing=(7, 7)),
    Case("a ResNet's last maps", n=2, capacity=3, c=300, trailing=(7, 7), **BLOCK),
    Case("neither side a power of two", n=4, capacity=6, c=24, trailing=(5, 9), **BLOCK),
    Case("maps of one line", n=3, capacity=4, c=72, trailing=(1, 13)),
    Case("whole vectors of positions", n=3, capacity=4, c=16, trailing=(8, 16), **BLOCK),
    Case("a ResNet's middle maps", n=2, capacity=3, c=40, trailing=(28, 28)),
    Case("a ResNet's first maps", n=2, capacity=3, c=8, trailing=(56, 56), **BLOCK),
    Case("an odd channel of the first maps", n=3, capacity=4, c=3, trailing=(56, 55)),
    Case("sequences", n=4, capacity=5, c=6, trailing=(11,)),
    Case("volumes", n=3, capacity=4, c=5, trailing=(2, 3, 4), **BLOCK),
]


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.why)
@backends
def test_shapes(backend, case, device):
    for layout in ("contiguous", "last") if case.trailing else ("contiguous",):
        case = replace(case, layout=layout)
        inputs = make(case, torch.float64, device)
        assert_exact(case, outcome(case, inputs, backend), truth(case, inputs))


SMALL = Case("small")
VARIANTS = [
    *(
        replace(SMALL, why=f"{activation} {residual=}", activation=activation, residual=residual)
        for activation in ACTIVATIONS
        for residual in (False, True)
    ),
    Case("no parameters", weight=False, bias=False, **BLOCK),
    Case("a weight alone", bias=False, activation="silu"),
    Case("a bias alone", weight=False, activation="relu6"),
    Case("nothing kept", running=False),
    Case("statistics that stay", momentum=0.0),
    Case("statistics of the last batch", momentum=1.0),
    Case("the mean over all batches", momentum=None),
    Case("an eps that counts", eps=0.5, **BLOCK),
    Case("W before H", layout="permuted", **BLOCK),
    Case("every other channel", layout="strided", activation="hardswish", residual=True),
    Case("every other feature", layout="strided", trailing=()),
]


@backends
@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.why)
def test_variants(backend, case, device):
    for layout in ("contiguous", "last") if case.layout == "contiguous" else (case.layout,):
        case = replace(case, layout=layout)
        inputs = make(case, torch.float64, device)
        assert_exact(case, outcome(case, inputs, backend), truth(case, inputs))


@two_layouts
@pytest.mark.parametrize("n", range(10))
@backends
def test_any_count_of_a_buffer(backend, n, layout, device):
    """0: zeros, and nothing moves. 1: the running statistics, which stay. 9: nothing is padded."""
    case = Case(f"n={n}", n=n, capacity=9, c=5, trailing=(3, 3), layout=layout, **BLOCK)
    inputs = make(case, torch.float64, device)
    found = outcome(case, inputs, backend)
    assert_exact(case, found, truth(case, inputs))
    if n < 2:
        assert torch.equal(found["running_mean"], inputs.running_mean)
        assert torch.equal(found["running_var"], inputs.running_var)
    assert found["num_batches_tracked"] == BATCHES + (n > 1)


@pytest.mark.parametrize("trailing", [(), (2, 3)], ids=["features", "maps"])
@pytest.mark.parametrize("n", [0, 1])
@backends
def test_too_few_rows_with_nothing_kept(backend, n, trailing, device):
    """A single row by its own statistics, of a feature: its bias."""
    case = Case(f"n={n}", n=n, trailing=trailing, running=False, activation="silu")
    inputs = make(case, torch.float64, device)
    assert_exact(case, outcome(case, inputs, backend), truth(case, inputs))


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "the mean of all"])
@backends
def test_a_modules_statistics_over_batches_of_many_sizes(backend, momentum, device):
    """As BatchNorm2d itself moves them; sizes 0 and 1, which it refuses, are left out there."""
    exact = nn.BatchNorm2d(6, momentum=momentum, dtype=torch.float64, device=device)
    ours = nn.BatchNorm2d(6, momentum=momentum, dtype=torch.float64, device=device)
    for seed, n in enumerate((4, 2, 1, 7, 0, 8)):
        i = make(Case("", n=n, capacity=8, c=6), torch.float64, device, seed=seed)
        y = HF.masked_batch_norm(
            i.x, i.count, ours.weight, ours.bias, ours.running_mean, ours.running_var,
            ours.momentum, ours.eps, backend=backend, num_batches_tracked=ours.num_batches_tracked,
        )  # fmt: skip
        if n > 1:
            torch.testing.assert_close(y[:n], exact(i.x[:n]), rtol=1e-10, atol=1e-10)
        for name, buffer in exact.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-10, atol=1e-10)


@backends
def test_the_mean_of_all_batches_uncounted_is_the_last(backend, device):
    case = Case("", momentum=None)
    i = make(case, torch.float64, device)
    i.num_batches_tracked = None
    found, expected = outcome(case, i, backend), truth(replace(case, momentum=1.0), make(
        case, torch.float64, device))  # fmt: skip
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)


@two_layouts
@backends
def test_the_result_lies_as_x_does(backend, layout, device):
    i = make(Case("", layout=layout), torch.float32, device).copy()
    y = normalised(Case(""), i, backend)
    assert y.stride() == i.x.stride()
    assert y.dtype == i.x.dtype
    (gradient,) = torch.autograd.grad(y.square().sum(), i.x)
    assert gradient.stride() == i.x.stride()


@backends
def test_a_residual_and_a_gradient_in_other_layouts_than_x(backend, device):
    case = Case("", **BLOCK)
    for of_x, of_residual, of_gradient in (
        ("contiguous", "last", "last"),
        ("last", "contiguous", "contiguous"),
        ("last", "permuted", "strided"),
    ):
        i = make(case, torch.float64, device)
        expected = truth(case, i)
        i.x, i.residual = laid_out(i.x, of_x), laid_out(i.residual, of_residual)
        i.d_y = laid_out(i.d_y, of_gradient)
        assert_exact(case, outcome(case, i, backend), expected)


@pytest.mark.parametrize("n", [0, 1, 3])
@two_layouts
@backends
def test_padding_changes_no_bit(backend, layout, n, device):
    case = Case("", n=n, layout=layout, **BLOCK)
    inputs = make(case, torch.float32, device)
    first = outcome(case, inputs, backend)
    for value in (0.0, 1e30, -1.0, float("inf")):
        for tensor in (inputs.x, inputs.residual, inputs.d_y):
            tensor[n:] = value
        for name, found in outcome(case, inputs, backend).items():
            assert torch.equal(found, first[name]), name


# To the float's own precision, at the last: z is the bias, whatever x is.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "silu": (0.0,), "hardswish": (-4.0, 0.0, 4.0)}


@pytest.mark.parametrize("activation", KINKS)
@backends
def test_derivatives_where_an_activation_bends(backend, activation, device):
    """As torch takes them; d_bias and d_residual hold them."""
    for z in KINKS[activation]:
        case = Case(f"{activation} at {z}", activation=activation, residual=True)
        i = make(case, torch.float64, device)
        i.weight, i.residual = torch.zeros_like(i.weight), torch.zeros_like(i.residual)
        i.bias = torch.full_like(i.bias, z)
        assert_exact(case, outcome(case, i, backend), truth(case, i))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@two_layouts
@backends
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of what is not finite
def test_a_valid_row_that_is_not_finite_shows(backend, layout, activation, device):
    """Where torch's result and statistics are not finite, neither are ours: nothing is hidden."""
    for value in (float("nan"), float("inf")):
        case = Case("", activation=activation, residual=True, layout=layout)
        for name in ("x", "residual"):
            i = make(case, torch.float64, device)
            getattr(i, name)[1, 2] = value
            found, expected = outcome(case, i, backend), truth(case, i)
            for what in ("y", "running_mean", "running_var"):
                assert torch.equal(found[what].isfinite(), expected[what].isfinite()), (name, what)
            assert_nothing_padded(case, found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@backends
@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, of exp
def test_values_far_out_stay_finite(backend, activation, device):
    """Where exp(-z) overflows, forward and backward."""
    case = Case("", activation=activation, residual=True)
    for value in (-1e4, 1e4):
        i = make(case, torch.float32, device)
        i.residual = torch.full_like(i.residual, value)
        i.residual[case.n :] = float("nan")
        found, expected = outcome(case, i, backend), truth(case, i)
        for name in ("y", "d_bias", "d_residual", "d_x"):
            assert found[name].isfinite().all()
            size = expected[name].abs().max().item()
            error = (found[name] - expected[name]).abs().max().item()
            assert error <= 2.0**-12 * size  # z has 2**-24 of 1e4 left of x
