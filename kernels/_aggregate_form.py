"""Which form aggregate takes, grouped or dense, and what its products are computed in."""

from __future__ import annotations

import torch
from torch import Tensor

from ._aggregate_maps import adds_in_place
from ._common import RowPlan
from ._layout import trailing_size

# Operations that cost as much as moving one byte, (float32, half precision): H100 and H200
# without tf32 67 Tflop/s, with bfloat16 tensor cores at a realistic half of 990, over 3.35 TB/s.
_BALANCE = (20, 150)
# The grouped product is taken to run at half the speed of the vendor's dense one.
_GROUPED_COST = 2


def product_dtype(outputs: Tensor) -> torch.dtype:
    """What the products are computed in: autocast's dtype where it is on, else the outputs'."""
    device = outputs.device.type
    if torch.is_autocast_enabled(device) and outputs.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return outputs.dtype


def prefer_grouped(
    samples: int, experts: int, k: int, channels: int, c_out: int, itemsize: int
) -> bool:
    """Whether the grouped form should beat the concatenation and a dense product.

    ``samples`` counts a map's every element. Compares bytes moved and operations done, forward
    and backward, the latter turned into bytes at _BALANCE. The line was drawn by counting. Far on
    the grouped side of it, at (4096, 64, 2, 1000), the grouped form was 6.7 (bfloat16) and 11.6
    times (float32) as fast on an H200; near the line nothing was measured.
    """
    rows, balance = samples * k, _BALANCE[itemsize == 2]
    # The concatenation and its gradient are each written once; the first is read twice, the
    # second once. Three products: of the result, the concatenation's gradient, the matrix's.
    concat = samples * experts * channels * itemsize
    dense = 5 * concat + 6 * samples * experts * channels * c_out / balance
    # Float32 products written and read once; rows read thrice and written once; padding taken as
    # half a tile that is as high as an expert's share of the rows.
    tile = min(max(rows // experts, 16), 64)
    padded = rows + experts * tile // 2
    grouped = 2 * rows * c_out * 4 + 4 * rows * channels * itemsize
    grouped += _GROUPED_COST * 6 * padded * channels * c_out / balance
    return grouped < dense


def choose_grouped(outputs: Tensor, weights: Tensor, plan: RowPlan, matrix: Tensor) -> bool:
    """``prefer_grouped`` at these tensors' sizes; maps always: a concatenation of theirs would be
    most of a step's memory."""
    if adds_in_place(outputs):
        return True
    n, k = weights.shape
    samples, experts = n * trailing_size(outputs), plan.offsets.numel() - 1
    itemsize = product_dtype(outputs).itemsize
    return prefer_grouped(samples, experts, k, outputs.shape[1], matrix.shape[0], itemsize)
