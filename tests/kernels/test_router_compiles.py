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
    assert new.pop(65) == {"_plan_kernel", "_scan_kernel", "route_kernel"}
    assert not any(new.values()), new


def test_wide_hubs_compile(tmp_path):
    """Triton 3.8 cannot compile a gather of a small tile on several warps, as it would be with few
    slots of a wide hub."""
    script = """
from bench.compile_cases import router_cases
from bench.compile_report import compile_case
for m in (513, 600, 1024):
    for case in router_cases(300, m, 1):
        if case.name.startswith(("route eps", "plan")):
            print(case.name, *compile_case(case, 90).failures)
"""
    expected = [
        f"{name} N=300 M={m} K=1\n" for m in (513, 600, 1024) for name in ("route eps", "plan")
    ]
    assert run_compiled("-c", script, TRITON_CACHE_DIR=tmp_path) == "".join(expected)


def test_a_sample_lies_in_few_lanes(tmp_path):
    """Shuffles are what a layout costs. Triton chooses it, and another version might otherwise."""
    script = """
from bench import compile_report
from bench.compile_cases import router_cases
read_sass = compile_report.read_sass
def count_shuffles(text):
    print(case.name + ":", text.count(" SHFL."))
    return read_sass(text)
compile_report.read_sass = count_shuffles
for case in router_cases(262144, 64, 2):
    if " eps" in case.name and " no " not in case.name:
        compile_report.compile_case(case, 90)
"""
    printed = run_compiled("-c", script, TRITON_CACHE_DIR=tmp_path)
    lines = dict(line.split(": ") for line in printed.splitlines())
    # A tile's 46, and 48 for the sum over samples at the end. A plain [8, 64] tile takes 204 and 8.
    assert int(lines["route eps N=262144 M=64 K=2"]) <= 96
    # 3 reductions of 2, and those of the two slots. A plain tile takes 50.
    assert int(lines["route backward eps N=262144 M=64 K=2"]) <= 16
