"""Heads on features and their update as compiled, against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from support.head_cases import CASES as HEADS
from support.head_cases import FP16, FP32, Case, Problem, assert_exact, check_updates
from support.output_cases import poisoned


def heads(case: Case, dtype: torch.dtype, features: torch.dtype) -> None:
    with poisoned():
        assert_exact(Problem(case, dtype, features))


def updates() -> None:
    with poisoned():
        check_updates(FP32)


CASES: dict[str, Callable[[], None]] = {
    **{f"heads {case.why}": partial(heads, case, FP32, FP16) for case in HEADS},
    "heads in fp16": partial(heads, HEADS[1], FP16, FP16),
    "heads on fp32": partial(heads, HEADS[0], FP32, FP32),
    "heads' updates": updates,
}
