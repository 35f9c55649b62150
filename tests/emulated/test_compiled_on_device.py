"""Kernels as compiled, launched by a program that runs on the emulated device."""

from __future__ import annotations

import ast

import pytest
from support.compiled import run_compiled

from bench.emulated.device import library

PROGRAM = """
import torch
from hubpath_fast import functional as HF
from triton.runtime import driver

torch.manual_seed(0)
x, clean = (torch.randn(9, size, device="cuda", requires_grad=True) for size in (37, 5))
routing = HF.noisy_topk(clean, torch.zeros_like(clean), 2)
joined = HF.combine(HF.gather(x, routing), routing)
joined.square().sum().backward()
weights = torch.zeros(9, 5, device="cuda").scatter(1, routing.experts, routing.weights)
expected = (weights[:, :, None] * x[:, None]).flatten(1)
print([torch.equal(joined, expected), x.grad.is_cuda, driver.active.launches])
"""


def test_a_program_on_the_device_launches_what_triton_compiles():
    try:
        library.build()
    except RuntimeError as error:
        pytest.skip(f"the emulated device cannot be built here: {error}")
    arguments = ("-m", "bench.emulated", "--kernels", "compiled", "-c", PROGRAM)
    equal, on_device, launches = ast.literal_eval(run_compiled(*arguments).splitlines()[-1])
    assert equal
    assert on_device
    assert launches[:3] == ["route_and_plan_kernel", "_gather_kernel", "_combine_forward"]
    assert set(launches[3:]) == {
        "_combine_backward", "_gather_backward_kernel", "_route_backward_kernel"
    }  # fmt: skip
