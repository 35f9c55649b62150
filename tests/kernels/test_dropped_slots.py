"""The kernels of a prediction where slots were dropped, against torch's implementation: nothing is
read from or written to a row that is not there (uninitialised memory is poisoned)."""

from __future__ import annotations

import pytest
import torch

from hubpath_fast import functional as HF
from hubpath_fast.model import RoutingPolicy

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def routing(n, m, k):
    torch.manual_seed(n)
    clean = 2 * torch.randn(n, m)
    found = RoutingPolicy(top_mass=0.6).route(clean, torch.zeros(n, m), k)
    assert n <= found.rows.numel() < n * k
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("sizes", [(9, 5, 3), (6, 3, 3)], ids=["some", "K=M"])
def test_gather_writes_the_rows_that_there_are(layout, sizes):
    found, m = routing(*sizes), sizes[1]
    x = torch.randint(0, 256, (sizes[0], 3, 4, 5), dtype=torch.uint8)
    scale, shift = torch.rand(m, 3), torch.randn(m, 3)
    for affine in ((None, None), (scale, shift)):
        ours, truth = (
            HF.gather(x, found, *affine, memory_format=layout, backend=backend)
            for backend in ("triton", "torch")
        )
        assert ours.shape == (found.rows.numel(), 3, 4, 5)
        torch.testing.assert_close(ours, truth)
    outs = []
    for backend in ("triton", "torch"):
        outs.append(torch.zeros(m * 10, 3, 4, 5).contiguous(memory_format=layout))
        HF.gather_into(outs[-1], x, found, scale, shift, backend)
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("trailing", [(), (2, 3), (5, 4)], ids=["vectors", "small", "maps"])
@pytest.mark.parametrize("sizes", [(9, 5, 3), (6, 3, 3)], ids=["some", "K=M"])
def test_combine_and_aggregate_leave_dropped_slots_out(trailing, sizes):
    found, (n, m, _) = routing(*sizes), sizes
    outputs = torch.randn(found.rows.numel(), 4, *trailing)
    matrix, bias = torch.randn(6, 4 * m), torch.randn(6)
    pairs = [
        [HF.combine(outputs, found, backend) for backend in ("triton", "torch")],
        [HF.aggregate(outputs, found, matrix, bias, backend) for backend in ("triton", "torch")],
    ]
    for ours, truth in pairs:
        assert len(ours) == n
        # Sums of 4 * 3 products of magnitude 1 to 10 in float32, in another order.
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
