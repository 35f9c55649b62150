"""Static memory that captured graphs read rows from."""

import torch

from hubpath_fast.executors.precision import RowPrecision
from hubpath_fast.executors.rows import InputBuffers, RowSource
from hubpath_fast.routing import Routing


def test_rows_of_other_ranks_may_be_more_than_any_expert_gets():
    # Two experts of a rank, each asked by two of three samples: four rows came, and no expert gets
    # more than the three samples that there are.
    x = torch.arange(8.0).view(4, 2)
    experts = torch.tensor([[0], [1], [0], [1]])
    plan = Routing(
        weights=torch.ones(4, 1), mean=torch.zeros(2), experts=experts,
        offsets=torch.tensor([0, 2, 4], dtype=torch.int32),
        rows=torch.tensor([0, 2, 1, 3], dtype=torch.int32),
        positions=torch.tensor([[0], [2], [1], [3]], dtype=torch.int32),
    )  # fmt: skip
    source = RowSource(
        x, plan, None, None, x.dtype, torch.contiguous_format, RowPrecision(), most_rows=3
    )
    buffers = InputBuffers(source, 3)
    assert buffers.fit(source)
    buffers.write(source)
    assert buffers.of(0, 2).tolist() == [[0, 1], [4, 5]]
    assert buffers.of(1, 2).tolist() == [[2, 3], [6, 7]]
