"""total_loss as compiled, in one program and in several, against float64."""

from __future__ import annotations

from functools import partial

import torch
from support.output_cases import poisoned
from support.total_losses import SIZES, check, make

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def total(size: str, dtype: torch.dtype) -> None:
    with poisoned():
        check(make(SIZES[size], dtype))


RUNS = [
    ("the paper's", FP32),
    ("one of each", FP32),
    ("ragged", FP32),
    ("ragged", BF16),
    ("ragged", FP16),
    ("two programs", FP32),
    ("two programs", BF16),
]
CASES = {
    f"total loss, {size}, {str(dtype).removeprefix('torch.')}": partial(total, size, dtype)
    for size, dtype in RUNS
}
