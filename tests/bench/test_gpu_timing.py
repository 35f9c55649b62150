"""Timing by captured graphs, on a GPU."""

from __future__ import annotations

import pytest
import torch

from bench import operations, timing
from bench.inputs import Size, batch_norm

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", operations.NAMES)
def test_a_kept_forward_is_differentiated_in_a_graph_beside_an_eager_one(name):
    own = batch_norm(40, 48, 100, 3, 5) if name == "masked_batch_norm" else Size(48, 5, 2, 100)
    operation = operations.make(name, own, "cuda")
    eager = operations.function(operation, "triton", "backward")
    graph = timing.capture(lambda: operations.function(operation, "triton", "backward"))
    assert timing.replayed({"backward": graph}, seconds=0, min_rounds=1)["backward"].p50 > 0
    eager()


def test_graphs_replay_what_was_captured():
    x, y = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    graph = timing.capture(lambda: lambda: x.add_(y))
    before = x.clone()
    found = timing.replayed({"add": graph}, seconds=0, min_rounds=3)
    assert torch.equal(x, before + 4)  # one replay to warm up, three timed
    assert found["add"].p50 > 0
