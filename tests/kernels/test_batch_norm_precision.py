"""masked_batch_norm in 32 and 16 bits against float64 of the same numbers, to derived bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.norm_cases import ACTIVATIONS, Case, assert_rounded, make, outcome, truth
from support.output_cases import ROUNDING, float_dtypes

backends = pytest.mark.parametrize("backend", ["triton", "torch"])
both = pytest.mark.parametrize("layout", ["contiguous", "last"])
BLOCK = {"activation": "relu", "residual": True}  # as a ResNet's blocks end

CASES = [
    *(Case(f"{a}", n=5, capacity=8, c=24, activation=a, residual=True) for a in ACTIVATIONS),
    Case("no parameters, no residual", weight=False, bias=False, activation="relu6"),
    Case("a ResNet's last maps", n=4, capacity=6, c=72, trailing=(7, 7), **BLOCK),
    Case("a ResNet's middle maps", n=3, capacity=4, c=8, trailing=(28, 28), **BLOCK),
    Case("features", n=13, capacity=16, c=37, trailing=(), activation="silu"),
    Case("a mean of 30", n=5, capacity=8, mean=30.0, activation="hardswish"),
    Case("a single row", n=1, capacity=4, c=24, **BLOCK),
    Case("the mean over all batches", momentum=None),
]


@both
@float_dtypes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
@backends
def test_within_the_roundings(backend, case, dtype, layout, device):
    case = replace(case, layout=layout)
    inputs = make(case, dtype, device)
    assert_rounded(case, inputs, outcome(case, inputs, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@backends
def test_parameters_and_statistics_of_16_bits(backend, dtype, device):
    """As a whole network converted: kept in 16 bits, computed in 32."""
    case = Case("", n=5, capacity=8, **BLOCK)
    inputs = make(case, dtype, device, kept=dtype)
    found = outcome(case, inputs, backend)
    for name in ("running_mean", "running_var", "d_weight", "d_bias"):
        assert found[name].dtype == dtype
    assert_rounded(case, inputs, found)


@both
@backends
def test_a_mean_of_a_thousand_deviations_costs_no_variance(backend, layout, device):
    """x has 1e3 * 2**-24 = 6e-5 deviations left, and the mean as much; from E[x^2] - E[x]^2 the
    variance would be off by 1e6 * 2**-24 = 6 %."""
    case = Case("", n=6, capacity=8, c=5, trailing=(14, 14), mean=1e3, layout=layout)
    inputs = make(case, torch.float32, device)
    found, expected = outcome(case, inputs, backend), truth(case, inputs)
    for name, size in (("y", 4), ("running_var", 1), ("d_x", 4)):
        error = (found[name] - expected[name]).abs().max().item()
        assert error <= size * 1e3 * 8 * ROUNDING[torch.float32], name
