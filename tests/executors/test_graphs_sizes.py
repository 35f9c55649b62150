"""Predictions as captured graphs, padded sizes, and which experts get which."""

import pytest
import torch
from support.graphs import (
    SIZES_AROUND_SIX,
    assert_as_sequential,
    backward,
    fixed_routing,
    predict,
    replays,
    row_wise_expert,
)
from support.models import M, batch

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN
from hubpath_fast.executors.graphs.capacities import bucket


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_predictions_are_captured_in_buckets_though_there_is_batch_norm(make, mode):
    model, (x, _) = make(), batch()
    sizes = ([5, 6, 4, 9], [7, 5, 3, 9], [8, 8, 4, 4], [6, 7, 0, 11])
    found = [predict(model, x, counts, mode) for counts in sizes for _ in range(2)]
    report = model.executor_report()
    assert report.captured == {}
    assert report.captured_predictions == {0: [8], 1: [8], 2: [4], 3: [12]}
    assert model.executor._backend.captures == M  # forwards alone
    # The graph comes with the third sight of its size: of eight predictions without expert 2 in
    # two, and expert 3 twice at 4 instead of 12.
    assert report.hits == 6 + 6 + 4 + 4
    assert "experts[3]: predictions at sizes [12]" in str(report)
    model.executor = "sequential"
    expected = [predict(model, x, counts, mode) for counts in sizes for _ in range(2)]
    for a, b in zip(found, expected, strict=True):
        assert a.is_inference() == b.is_inference()
        # float32: padded batches may be summed in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_inference_mode_and_no_grad_share_graphs(make):
    model, (x, _) = make(), batch()
    for _ in range(MIN_SEEN):
        first = predict(model, x, [6] * M, torch.inference_mode)
    with replays(model, M):
        assert torch.equal(predict(model, x, [6] * M, torch.no_grad), first)
    assert model.executor._backend.captures == M


def test_training_and_predictions_keep_their_graphs_and_do_not_disturb_each_other(trained):
    model, x, y = trained()
    for _ in range(MIN_SEEN):
        predict(model, x, [6] * M)
    captures = model.executor._backend.captures
    assert captures == 3 * M  # forward and backward, and forward
    predictions = []

    def round_of_both(model):
        """A prediction between a forward and its backward; another after the update."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        out = model(x, routing=fixed_routing(model))
        between = predict(model, x, [6] * M)
        hp.HubPathwayLoss()(out, y).total.backward()
        optimizer.step()
        predictions.append((between, predict(model, x, [6] * M)))

    with replays(model, 3 * M):
        assert_as_sequential(model, round_of_both)
    assert model.executor._backend.captures == captures
    expected, found = predictions
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(*found)


def test_rows_are_padded_where_no_layer_couples_them(trained):
    model, x, y = trained(row_wise_expert, counts=[5, 6, 4, 9])
    assert model.executor_report().captured == {
        0: SIZES_AROUND_SIX,
        1: SIZES_AROUND_SIX,
        2: SIZES_AROUND_SIX,
        3: [4, 8, 12, 16],
    }

    def run(model):
        backward(model, x, y, fixed_routing(model, counts=[7, 5, 3, 9]))

    with replays(model, M):
        # float32, sums over more (zero) terms in another order
        assert_as_sequential(model, run, rtol=1e-5, atol=1e-6)


def test_buckets_hold_their_counts_and_waste_little():
    sizes = [bucket(count) for count in range(1, 1025)]
    assert sizes == sorted(sizes)
    assert sorted(set(sizes))[:11] == [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert all(count <= size for count, size in enumerate(sizes, 1))
    assert all(size <= count * 1.125 for count, size in enumerate(sizes, 1) if count > 32)
    assert len(set(sizes)) <= 50


def test_predictions_in_inference_mode_are_captured_without_buffers_too(make):
    """Their rows' buffers would take 73,728 bytes, more than a quarter of the budget."""
    model, (x, _) = make(budget=200_000), batch()
    for _ in range(MIN_SEEN):
        predict(model, x, [6] * M, torch.inference_mode)
    report = model.executor_report()
    assert report.captured_predictions == {i: [8] for i in range(M)}
    assert report.notes == ()
