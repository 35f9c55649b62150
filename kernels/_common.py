"""What the kernel files share: sizes of tiles, and what is computed in."""

from __future__ import annotations

from typing import Protocol

import torch
import triton.language as tl
from torch import Tensor

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class RowPlan(Protocol):
    """Where rows lie: what ``noisy_topk`` finds, as anything with these fields."""

    experts: Tensor  # [N, K] int64, distinct within a sample, but for dropped slots
    rows: Tensor  # [R] int32, row -> slot n*K + j; by expert, then by sample
    positions: Tensor  # [N, K] int32, slot -> row; of a dropped one, its sample's first row
    offsets: Tensor  # [M + 1] int32; the rows of expert i are offsets[i]:offsets[i + 1]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """What an operation computes in: float64 if anything is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
