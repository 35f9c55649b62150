"""The buffers that graphs read, and the streams they run on: stand-ins for CUDA's."""

import pytest
import torch
from support.graphs import (
    SIZES_AROUND_SIX,
    assert_as_sequential,
    backward,
    fixed_routing,
    norm_expert,
    predict,
    replays,
    row_wise_expert,
    settled,
)
from support.models import M, batch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN
from hubpath_fast.executors.rows import RowSource

FULL = [8, 8, 4, 4]  # groups that fill their buckets, so that sums agree to the bit


@pytest.fixture
def packed(monkeypatch):
    """The batches that were gathered in expert order instead of written to buffers."""
    found, rows = [], RowSource.rows

    def spy(source):
        found.append(len(source.x))
        return rows(source)

    monkeypatch.setattr(RowSource, "rows", spy)
    return found


def step(x, y, counts=None):
    return lambda model: backward(model, x, y, fixed_routing(model, counts=counts))


@pytest.mark.parametrize("images", [torch.float32, torch.uint8])
def test_rows_are_written_where_graphs_read_them_normalised_on_the_way(make, packed, images):
    model, (x, y) = make(), batch()
    if images == torch.uint8:
        x = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    mean = torch.arange(1.0, 1 + M * 3).view(M, 3) / 20
    model.input_mean, model.input_std = mean, mean + 0.1
    settled(model, x, y)
    assert len(packed) == MIN_SEEN
    assert assert_as_sequential(model, step(x, y), packed) == 0


def two_forwards(x, y):
    """Two forwards before one backward."""

    def run(model):
        routings = [fixed_routing(model, counts=FULL) for _ in range(2)]
        outs = [model(part, routing=r) for part, r in zip((x, x.flip(0)), routings, strict=True)]
        sum(hp.HubPathwayLoss()(out, y).total for out in outs).backward()

    return run


def test_rows_that_a_backward_pass_needs_are_not_written_over(trained, packed):
    model, x, y = trained(row_wise_expert, counts=FULL)
    with replays(model, M):  # the second forward runs eagerly
        assert assert_as_sequential(model, two_forwards(x, y), packed) == 1


def test_an_eager_expert_keeps_its_rows_among_captured_ones(make, packed):
    model, (x, y) = make(row_wise_expert), batch()
    for index in (0, 2, 3):  # frozen: none of their forwards waits for a backward
        model.experts[index].requires_grad_(False)
    model.experts[1][0].register_forward_hook(lambda *_: None)
    settled(model, x, y, counts=FULL)
    assert (
        assert_as_sequential(model, two_forwards(x, y), packed) == 0
    )  # both were written to the buffers


def test_an_input_that_requires_a_gradient_is_copied_and_gets_it(make, packed):
    model, (x, y) = make(row_wise_expert), batch()
    x.requires_grad_()
    settled(model, x, y, MIN_SEEN + 1)
    assert len(packed) == MIN_SEEN + 1
    found = []

    def run(model):
        x.grad = None
        backward(model, x, y, fixed_routing(model))
        found.append(x.grad)

    with replays(model, M):
        assert_as_sequential(model, run, rtol=1e-5, atol=1e-7)  # float32, padded batches
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_experts_that_write_to_their_input(trained):
    def in_place():
        return nn.Sequential(nn.Hardtanh(0.2, 0.8, inplace=True), row_wise_expert())

    model, x, y = trained(in_place, counts=FULL)
    assert_as_sequential(model, step(x, y, FULL))


def test_buffers_that_would_take_too_much_are_done_without(trained, packed):
    model, x, y = trained(steps=MIN_SEEN + 2, budget=280_000)
    assert model.executor_report().hits == 3 * M
    assert len(packed) == MIN_SEEN + 2  # 73,728 bytes are more than a quarter of the budget
    assert model.executor_report().memory == M * (200 + 6 * 768)  # graphs, and what they read
    assert_as_sequential(model, step(x, y))


def test_a_larger_batch_gets_larger_buffers(trained, packed):
    model, x, y = trained(steps=MIN_SEEN + 1)
    assert len(packed) == MIN_SEEN
    larger, labels = batch(n=40)
    counts = [10, 10, 10, 10]
    settled(model, larger, labels, MIN_SEEN + 1, counts)
    assert packed == [24] * MIN_SEEN + [40]  # the first of them is copied
    assert model.executor_report().captured == {i: [10] for i in range(M)}
    backward(model, x, y, fixed_routing(model))  # the smaller one fits, and was seen often enough
    assert packed == [24] * MIN_SEEN + [40]
    assert model.executor_report().captured == {i: [6, 10] for i in range(M)}
    assert model.executor_report().hits == 4 * M + M


def test_a_larger_batch_whose_groups_fit_has_all_sizes_captured_again_at_once(make, packed):
    model = make(norm_expert)
    settled(model, *batch())
    assert model.executor_report().captured == dict.fromkeys(range(M), SIZES_AROUND_SIX)
    with replays(model, 4 * M):
        settled(model, *batch(n=40), 4, counts=[10] * M)
    assert packed == [24] * MIN_SEEN + [40]
    # Of a mean of 10 rows with a deviation of 2.74, after four steps.
    sizes = [4, 8, 12, 16, 20]
    assert model.executor_report().captured == dict.fromkeys(range(M), sizes)


def test_batches_that_grow_step_by_step_do_not_renew_the_buffers_at_each(make):
    model, capacities = make(norm_expert), set()
    for n in range(33, 49):
        settled(model, *batch(n=n), 1, counts=[n - 24, 8, 8, 8])
        if buffers := model.executor._store.buffers.get(True):
            capacities.add(buffers.capacity)
    assert sorted(capacities) == [35, 36, 40, 45, 50]


def test_predictions_have_buffers_of_their_own(make, packed):
    model, (x, _) = make(), batch()
    for _ in range(MIN_SEEN + 2):
        predict(model, x, [5, 6, 4, 9])
    assert len(packed) == MIN_SEEN
    assert set(model.executor._store.buffers) == {False}


def test_each_expert_keeps_its_stream(trained):
    model, x, y = trained(row_wise_expert)
    log = model.executor._backend.log
    log.clear()
    backward(model, x, y, fixed_routing(model))
    assert log == [0, 1, 2, 0]
    backward(model, x, y, fixed_routing(model, counts=[0, 12, 0, 12]))
    assert log[4:] == [1, 0]


def test_what_an_earlier_batch_left_in_a_buffer_reaches_no_gradient(trained):
    model, x, y = trained(row_wise_expert, counts=FULL)
    spoilt = x.clone()
    spoilt[[7, 15]] = float("nan")  # the last rows of experts 0 and 1
    backward(model, spoilt, y, fixed_routing(model, counts=FULL))
    assert all(p.grad.isnan().any() for p in model.experts[:2].parameters())
    model.zero_grad(set_to_none=True)
    backward(model, x, y, fixed_routing(model, counts=[7, 7, 6, 4]))
    assert all(p.grad.isfinite().all() for p in model.experts.parameters())
