"""What is emulated: name of a case -> function that raises AssertionError or memory.Fault."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from bench.compile_cases import every_case
from bench.emulated.ptx.driver import emulated

from . import (
    batch_norm_cases,
    gather_cases,
    heads_cases,
    joining_cases,
    launch_cases,
    planted,
    router_cases,
    total_loss_cases,
)

# One case of each operation beside the router's, and of what gather launches for turned layouts.
COVERING = (
    *router_cases.CASES,
    "gather 13x37 fp32",
    "gather 5x20x7x9 fp32 to bf16 last",
    "combine 13,5,2,37 float32",
    "aggregate 13,5,2,37 float32",
    "aggregate 3,5,2,37 maps 9x11 float32",
    "loss 13,5,2,37 float32",
    "combine with both 13,5,2,37 float32",
    "total loss, two programs, float32",
    "norm 4x3x5x5 no row float32",
    "heads different D",
    "heads' updates",
)


def every_kernel() -> None:
    """What is compiled for the report is all run here: a new kernel is not left out unnoticed."""
    with emulated() as device:
        for name in COVERING:
            CASES[name]()
    missing = {case.launch.kernel.__name__ for case in every_case()} - set(device.launches)
    assert not missing, f"no case runs {sorted(missing)}"


CASES: dict[str, Callable[[], None]] = {
    **router_cases.CASES,
    **gather_cases.CASES,
    **joining_cases.CASES,
    **total_loss_cases.CASES,
    **batch_norm_cases.CASES,
    **heads_cases.CASES,
    **planted.CASES,
    **launch_cases.CASES,
    "every kernel": every_kernel,
}


def run(name: str) -> str | None:
    """What is wrong with one case, in words; None if nothing is."""
    torch.set_num_threads(1)  # small tensors: threads only wait for each other
    with emulated():
        try:
            CASES[name]()
        except Exception:
            return traceback.format_exc()
    return None
