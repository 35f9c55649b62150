"""masked_batch_norm and its gradients as compiled, against torch's BatchNorm in float64.

From 256 items on (rows x positions) several programs share a channel, whose sums meet in memory.
"""

from __future__ import annotations

from functools import partial

import torch
from support.norm_cases import Case, assert_rounded, make, outcome
from support.output_cases import poisoned

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = {"activation": "relu", "residual": True}  # as a ResNet's blocks end


def normalised(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    with poisoned():
        found = outcome(case, inputs, "kernels")
    assert_rounded(case, inputs, found)


def counted_too_high(case: Case) -> None:
    """A count above the buffer's size is taken as that: nothing beyond is touched."""
    inputs = make(case, FP32)
    inputs.count += 3
    assert_rounded(case, inputs, outcome(case, inputs, "kernels"))


RUNS = [
    (Case("6x24x11x13 last", n=5, capacity=6, c=24, trailing=(11, 13), layout="last", **BLOCK),
     (BF16, FP32)),
    (Case("6x10x8x16", n=5, capacity=6, c=10, trailing=(8, 16), **BLOCK), (BF16, FP32)),
    (Case("5x72x9x9 last", n=3, capacity=5, c=72, trailing=(9, 9), layout="last",
          activation="silu"), (FP16,)),
    (Case("9x12x7x7", n=8, capacity=9, c=12, trailing=(7, 7), activation="hardswish",
          residual=True), (FP16,)),
    (Case("5x5x13x9 no parameters", n=4, capacity=5, c=5, trailing=(13, 9), weight=False,
          bias=False), (FP32,)),
    (Case("300x37", n=290, capacity=300, c=37, trailing=(), activation="relu6"), (FP32, BF16)),
    (Case("4x16x8x8 last one row", n=1, capacity=4, c=16, trailing=(8, 8), layout="last", **BLOCK),
     (BF16,)),
    (Case("4x3x5x5 no row", n=0, capacity=4, c=3, trailing=(5, 5), **BLOCK), (FP32,)),
    (Case("3x6x4x4 full, mean of all batches", n=3, capacity=3, c=6, trailing=(4, 4),
          momentum=None, activation="silu", residual=True), (BF16,)),
    (Case("4x6x9x9 last nothing kept", n=3, capacity=4, c=6, trailing=(9, 9), layout="last",
          running=False, activation="relu6"), (FP32,)),
]  # fmt: skip
CASES = {
    f"norm {case.why} {str(dtype).removeprefix('torch.')}": partial(normalised, case, dtype)
    for case, dtypes in RUNS
    for dtype in dtypes
} | {
    "norm 4x6x9x9 of 7 rows": partial(
        counted_too_high, Case("7 rows", n=4, capacity=4, c=6, trailing=(9, 9), **BLOCK)
    ),
}
