"""Training with BatchNorm in padded groups: as without padding, whatever a loop does.

In float64, without dropout, which would draw for the padded rows too.
"""

import pytest
import torch
from support.graphs import (
    SIZES_AROUND_SIX,
    FakeBackend,
    Mixing,
    assert_close,
    backward,
    compare_steps,
    doubles,
    fixed_routing,
    grads,
    norm_expert,
    predict,
    replays,
    row_wise_expert,
    settled,
)
from support.models import C, M, batch, conv_expert
from support.tape_backend import TapeBackend
from torch import nn
from torch.utils.checkpoint import checkpoint

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN
from hubpath_fast.executors.graphs.capture import CapturedModule, Pool

COUNTS = ([6, 6, 6, 6], [5, 7, 9, 3], [2, 10, 8, 4], [7, 7, 1, 9], [11, 4, 9, 0])


def several_norms():
    """BatchNorm of maps and of vectors, of cumulative momentum and without statistics of its own
    any more, in a block with a residual sum and activations."""

    class Block(nn.Module):
        row_wise = True

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None)

        def forward(self, x):
            return torch.relu(self.norm(self.conv(x)) + x)

    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.SiLU(), Block(), nn.Flatten(),
        nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Hardswish(), nn.Linear(8, C),
    )  # fmt: skip


class Checkpointed(nn.Module):
    """Runs a part of itself again in the backward pass."""

    row_wise = True

    def __init__(self):
        super().__init__()
        self.conv, *rest = norm_expert()
        self.rest = nn.Sequential(*rest)

    def forward(self, x):
        return checkpoint(self.rest, self.conv(x), use_reentrant=False)


def trained_alike(model, twin, rounds=1):
    for counts in COUNTS * rounds:
        compare_steps(model, twin, 1, counts)


@pytest.mark.parametrize("backend", [TapeBackend, FakeBackend])
@pytest.mark.parametrize("expert", [norm_expert, several_norms])
def test_groups_of_any_size_are_trained_as_without_padding(pair, expert, backend):
    model, twin = pair(expert, backend)
    trained_alike(model, twin, rounds=3)
    report = model.executor_report()
    # Of 15 steps two came before the first capture, and three groups each had one row or none.
    assert (report.hits, report.misses) == (13 * M - 6, 2 * M + 3)
    assert report.exact == {}
    assert report.padded_rows > 0


def test_an_expert_with_a_checkpoint_runs_masked_in_the_backward_pass_too(pair):
    model, twin = pair(Checkpointed)
    for counts in (*COUNTS[:MIN_SEEN], *COUNTS[:MIN_SEEN]):
        compare_steps(model, twin, 1, counts)
    assert model.executor_report().hits == 4 * M
    assert model.executor_report().notes == ()


@pytest.mark.parametrize("min_group", [1, 2, 5])
def test_small_groups_run_eagerly_and_so_does_a_single_row_at_any_min_group(pair, min_group):
    model, twin = pair(norm_expert)
    model.min_group = twin.min_group = min_group
    compare_steps(model, twin, MIN_SEEN)
    with replays(model, {1: 3, 2: 3, 5: 2}[min_group]):
        compare_steps(model, twin, 1, [1, 4, 12, 7])


def test_a_single_row_is_replayed_where_nothing_takes_statistics_of_the_batch(pair):
    model, twin = pair(row_wise_expert)
    model.min_group = twin.min_group = 1
    compare_steps(model, twin, MIN_SEEN)
    with replays(model, 4):
        compare_steps(model, twin, 1, [1, 4, 12, 7])
    assert all(not record.masks for record in model.executor._store.of_experts(True))


def test_no_size_is_captured_that_no_group_is_replayed_in(pair):
    model, twin = pair(norm_expert)
    model.min_group = twin.min_group = 5
    compare_steps(model, twin, MIN_SEEN)
    assert model.executor_report().captured == dict.fromkeys(range(M), SIZES_AROUND_SIX[1:])


class Halved(nn.Module):
    """Gives BatchNorm other rows than it was given."""

    row_wise = True

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(torch.cat([x, x]))[: len(x)]


def test_an_expert_that_gives_batch_norm_other_rows_gets_exact_sizes(pair):
    model, twin = pair(lambda: nn.Sequential(Halved(), nn.Flatten(), nn.Linear(192, C)))
    compare_steps(model, twin, 2 * MIN_SEEN)
    with replays(model, M):
        compare_steps(model, twin, 1)
    report = model.executor_report()
    assert report.captured == {i: [6] for i in range(M)}
    assert (report.eager, report.notes) == ({}, ())
    assert report.exact[0].startswith("BatchNorm2d got ")


CHANGES = {
    "evaluation": lambda model: model.experts.eval(),
    "evaluation of one layer": lambda model: model.experts[0][1].eval(),
    "frozen weights": lambda model: model.experts[0][1].requires_grad_(False),
    "frozen expert": lambda model: model.experts[1].requires_grad_(False),
    "momentum": lambda model: setattr(model.experts[0][1], "momentum", 0.5),
    "no statistics kept": lambda model: setattr(model.experts[0][1], "track_running_stats", False),
    "single precision": lambda model: model.float(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_a_capture_counts_from_the_next_step(pair, name):
    model, twin = pair(norm_expert)
    compare_steps(model, twin, MIN_SEEN + 1)
    for each in (model, twin):
        CHANGES[name](each)
    x, y = doubles(seed=9)
    x = x.to(next(model.parameters()).dtype)
    # float32 is rounded where it is summed: over up to 20 rows of 36 positions.
    close = {"rtol": 1e-3, "atol": 1e-5} if x.dtype == torch.float32 else {}
    for counts in COUNTS[:MIN_SEEN] * 2:
        for each in (model, twin):
            each.zero_grad()
            backward(each, x, y, fixed_routing(each, counts=counts))
        assert_close(grads(model), grads(twin), **close)
    assert_close(model.state_dict(), twin.state_dict(), **close)
    assert len(model.executor_report().captured) == M


def test_in_autocast_padded_groups_are_trained_as_without_padding(pair):
    model, twin = (each.float() for each in pair(norm_expert))
    x, y = batch()
    for counts in COUNTS[:MIN_SEEN] * 2:
        for each in (model, twin):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = each(x, routing=fixed_routing(each, counts=counts))
            hp.HubPathwayLoss()(out, y).total.backward()
        # bfloat16 keeps 8 bits, and activations are rounded after another sum's last bit.
        found, expected = grads(model), grads(twin)
        for key, value in expected.items():
            if value is not None:
                assert (found[key] - value).abs().max() <= 0.05 * value.abs().max() + 1e-4, key
    # After the first step rows are gathered in bfloat16, and seen three times again.
    assert model.executor_report().hits == 3 * M


def test_a_second_forward_of_another_count_leaves_the_first_ones_backward(pair):
    model, twin = pair(norm_expert)
    compare_steps(model, twin, MIN_SEEN)
    with replays(model, M):  # the second runs eagerly
        for each in (model, twin):
            each.zero_grad()
            x, y = doubles(seed=3)
            outs = [
                each(part, routing=fixed_routing(each, counts=counts))
                for part, counts in ((x, [5, 7, 9, 3]), (x.flip(0), [8, 4, 2, 10]))
            ]
            sum(hp.HubPathwayLoss()(out, y).total for out in outs).backward()
    assert_close(grads(model), grads(twin))
    assert_close(model.state_dict(), twin.state_dict())


def test_a_dropped_forward_moves_the_statistics_by_its_own_rows_and_no_gradient(pair):
    model, twin = pair(norm_expert)
    compare_steps(model, twin, MIN_SEEN)
    with replays(model, 2 * M):
        for each in (model, twin):
            each.zero_grad()
            x, y = doubles(seed=3)
            each(x, routing=fixed_routing(each, counts=[8, 4, 2, 10]))
            backward(each, x, y, fixed_routing(each, counts=[5, 7, 9, 3]))
    assert_close(grads(model), grads(twin))
    assert_close(model.state_dict(), twin.state_dict())


def test_predictions_between_padded_steps_are_of_the_statistics_of_then(pair):
    model, twin = pair(norm_expert)
    x, _ = doubles(seed=5)
    for counts in COUNTS * 2:
        compare_steps(model, twin, 1, counts)
        assert_close(*(predict(each, x, [6] * M) for each in (model, twin)))


def captured(expert, size=8):
    x = doubles()[0][:size]
    return CapturedModule(expert, x, x.clone(), Pool(object()), FakeBackend(None), masks=True)


def test_the_count_is_memory_of_the_graphs_own_written_before_each_replay():
    graph = captured(norm_expert().double())
    assert (graph._count.dtype, graph._count.shape) == (torch.int32, ())
    assert graph._count.data_ptr() % 16 == 0
    memory = graph._count.data_ptr()
    for count in (8, 3, 5):
        graph(doubles()[0][:count])
        assert (int(graph._count), graph._count.data_ptr()) == (count, memory)


def test_more_rows_than_there_is_room_for_are_refused():
    graph = captured(norm_expert().double())
    with pytest.raises(ValueError, match=r"rows: expected at most 8, .* got 9"):
        graph(doubles()[0][:9])


def test_a_buffer_names_the_size_it_has_no_room_for(pair):
    model, twin = pair(norm_expert)
    compare_steps(model, twin, MIN_SEEN)
    buffers = model.executor._store.buffers[True]
    assert buffers.capacity == 24
    with pytest.raises(ValueError, match=r"size: expected at most 24 rows, .* got 25"):
        buffers.of(0, 25)


def test_the_report_says_who_has_exact_sizes_and_how_many_rows_were_padding(make):
    model, (x, y) = make(conv_expert), batch()
    model.experts[2] = Mixing(*conv_expert())
    settled(model, x, y, MIN_SEEN + 1)
    report = model.executor_report()
    assert report.captured == {
        0: SIZES_AROUND_SIX,
        1: SIZES_AROUND_SIX,
        2: [6],
        3: SIZES_AROUND_SIX,
    }
    assert report.exact == {2: "itself (Mixing) may mix rows"}
    assert "experts[2]: exact sizes, since itself (Mixing) may mix rows" in str(report)
    # Two steps of three groups of 6 rows in 8, and one of 6 in 6.
    assert (report.replayed_rows, report.padded_rows) == (2 * (3 * 8 + 6), 2 * 3 * 2)
    assert "  20.0% of replayed rows were padding" in str(report)


class Scaled(torch.autograd.Function):
    """Knows nothing of results that are not computed yet."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Scaling(nn.Module):
    row_wise = True

    def forward(self, x):
        return Scaled.apply(x)


def test_an_expert_that_cannot_be_fused_is_captured_without(pair):
    def expert():
        conv, norm, *rest = norm_expert()
        return nn.Sequential(conv, norm, Scaling(), *rest)

    model, twin = pair(expert)
    trained_alike(model, twin, rounds=2)
    report = model.executor_report()
    assert set(report.captured) == set(range(M))
    assert (report.eager, report.exact) == ({}, {})
    assert len(report.notes) == M
    for note in report.notes:
        assert note.endswith("it was captured at the second try, without fused BatchNorm")


def test_dropout_draws_again_in_each_replay(make):
    model, (x, _) = make(conv_expert), batch()
    outputs = []
    for _ in range(MIN_SEEN + 3):
        out = model(x, routing=fixed_routing(model))
        outputs.append(out.expert_outputs.detach().clone())
        out.prediction.sum().backward()
    assert model.executor_report().hits == 4 * M
    assert not torch.equal(outputs[-1], outputs[-2])
