"""What the router's kernels compile to, and when they compile again. No GPU needed."""

from __future__ import annotations

import sys

import pytest
import torch
from hubpath_fast.kernels import noisy_topk
from support.compiled import run_compiled
from support.specialisation import recorded

router = sys.modules["hubpath_fast.kernels.noisy_topk"]
plan = sys.modules["hubpath_fast.kernels._row_plan"]


def step(n, m, k, device, source="eps"):
    """Forward and backward, with gradients that are dense, and one number for all, as the sum of a
    loss sends it back."""
    both = torch.randn(n, 2 * m, device=device, requires_grad=True)
    clean, noise = both.chunk(2, dim=1)
    eps = torch.randn(n, m, device=device)
    out = noisy_topk(clean, noise, {"eps": eps, "draw": "draw", "none": None}[source], k, False)
    torch.autograd.grad(out[0].square().sum() + out[1].sum(), both, retain_graph=True)
    torch.autograd.grad(out[0].sum() + out[1].square().sum(), both)


@pytest.mark.parametrize("source", ["eps", "draw", "none"])
def test_another_batch_size_compiles_nothing(source, device):
    with recorded() as paper:
        step(48, 5, 2, device, source)
    assert {name for name, _ in paper} == {"_route_backward_kernel", "route_and_plan_kernel"}
    for n in (47, 32, 24, 17, 16, 1, 64):
        with recorded() as other:
            step(n, 5, 2, device, source)
        assert other <= paper, n


def test_a_batch_size_past_a_limit_compiles_the_forward_kernels_it_adds(device, monkeypatch):
    monkeypatch.setattr(router, "SMALL_BATCH", 8)
    monkeypatch.setattr(router, "ONE_LAUNCH", 32)
    monkeypatch.setattr(plan, "TWO_LAUNCHES", 64)
    monkeypatch.setattr(plan, "max_blocks", lambda n, m: 4)
    seen, new = set(), {}
    for n in (8, 7, 1, 9, 32, 17, 33, 48, 64, 40, 65, 128, 96, 127):
        with recorded() as keys:
            step(n, 6, 2, device)
        new[n] = {name for name, _ in keys - seen}
        seen |= keys
    assert new.pop(8) == {"_route_backward_kernel", "route_and_plan_kernel"}
    assert new.pop(9) == {"route_and_plan_kernel"}
    assert new.pop(33) == {"_plan_kernel", "route_kernel"}
    assert new.pop(65) == {"_plan_kernel", "_scan_kernel"}
    assert not any(new.values()), new


def test_wide_hubs_and_many_samples_compile(tmp_path):
    """Triton 3.8 cannot compile a gather of a small tile on several warps, as it would be with few
    slots of a wide hub. Of 2^27 samples, a block's are too many to count in 16 bits."""
    sizes = [(300, 513), (300, 600), (300, 1024), (2**27, 2)]
    script = f"""
from bench.compile_cases import router_cases
from bench.compile_report import compile_case
for n, m in {sizes}:
    for case in router_cases(n, m, 1):
        if case.name.startswith(("route eps", "plan")):
            print(case.name, *compile_case(case, 90).failures)
"""
    names = ("route eps", "plan")
    expected = [f"{name} N={n} M={m} K=1\n" for n, m in sizes for name in names]
    assert run_compiled("-c", script, TRITON_CACHE_DIR=tmp_path) == "".join(expected)


def test_a_tile_takes_few_instructions(tmp_path):
    """What a layout costs, Triton chooses, and another version might otherwise."""
    script = """
from bench.compile_cases import router_cases
from bench.compile_report import compile_case
from bench.issue_slots import read_code
for case in router_cases(262144, 64, 2):
    if " eps" in case.name and " no " not in case.name:
        report = compile_case(case, 90)
        code = read_code(report.sass)
        counted = code.loop or code.once
        print(counted["SHFL"], counted["BAR"], counted.total(), report.registers)
"""
    printed = run_compiled("-c", script, TRITON_CACHE_DIR=tmp_path)
    forward, backward = ([int(word) for word in line.split()] for line in printed.splitlines())
    # A plain [8, 64] tile takes 204 shuffles forward and 50 backward. Comparing the chosen experts
    # with every expert took 1,145 instructions; of 128 registers 16 programs fit.
    assert all(map(int.__le__, forward, [46, 0, 800, 128])), forward
    # 3 reductions of 2, and those of the two slots
    assert all(map(int.__le__, backward, [14, 0, 950, 96])), backward
