"""The logic of captured graphs, without a GPU: a stand-in backend that replays by running again."""

import gc

import pytest
import torch
from support.graphs import (
    SIZES_AROUND_SIX,
    FakeBackend,
    assert_as_sequential,
    assert_same,
    backward,
    exact_expert,
    fixed_routing,
    replays,
    settled,
)
from support.models import Faulty, M, batch, train
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN
from hubpath_fast.executors.graphs.backend import BrokenCaptureError
from hubpath_fast.executors.graphs.capture import CapturedModule, Pool


def test_training_is_the_same_to_the_bit_with_dropout_and_batch_norm(make):
    graphs, plain = make(), make()
    plain.executor = "sequential"
    state = train(graphs, 20)
    report = graphs.executor_report()
    assert report.hits > 20
    assert report.hits + report.misses == 20 * M
    generator = 1  # at the one size of all batches
    graphs_made = sum(map(len, report.captured.values())) + generator
    assert graphs_made == graphs.executor._backend.captures / 2  # forward and backward
    assert "the generator: training at sizes [24]" in report.notes
    assert f"graphs: {report.hits} groups replayed" in str(report)
    assert_same(state, train(plain, 20))


def test_a_capture_moves_no_buffer_no_row_and_no_random_state():
    expert, (x, _) = exact_expert(), batch()
    expert.insert(0, nn.ReLU(inplace=True))
    inputs = x[:8] - 0.5
    kept = inputs.clone()
    before = {name: b.clone() for name, b in expert.named_buffers()}
    random = torch.get_rng_state()
    captured = CapturedModule(expert, inputs[:6], inputs, Pool(None), FakeBackend(None))
    assert captured.draws  # Dropout
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs, kept)
    assert_same(dict(expert.named_buffers()), before)


def test_a_dropped_output_frees_the_graph_and_a_second_backward_raises(trained):
    model, x, y = trained()
    with replays(model, 2 * M):
        out = model(x, routing=fixed_routing(model))
        del out
        gc.collect()
        loss = hp.HubPathwayLoss()(model(x, routing=fixed_routing(model)), y).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


CHANGES = {  # all others: test_signature.py
    "setting": lambda model: setattr(model.experts[0][3], "p", 0.5),
    "another expert": lambda model: model.experts.__setitem__(0, exact_expert()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_expert_is_captured_again(trained, name):
    model, x, y = trained()
    CHANGES[name](model)
    with replays(model, M - 1):
        settled(model, x, y, 1)
    assert 0 not in model.executor_report().captured
    settled(model, x, y, MIN_SEEN - 1)
    assert model.executor_report().captured[0] == [6]


def test_an_expert_that_cannot_be_captured_runs_eagerly_and_is_named(trained):
    model, x, y = trained(steps=1)
    backend = model.executor._backend
    backend.fail = RuntimeError("operation not permitted\nwhen stream is capturing")
    settled(model, x, y)
    report = model.executor_report()
    assert (report.captured, report.eager) == ({}, {})
    failure = "a capture failed (RuntimeError: operation not permitted); it is tried once more"
    assert f"experts[3]: {failure}" in report.notes
    settled(model, x, y, 2 * MIN_SEEN)
    report = model.executor_report()
    why = "cannot be captured: RuntimeError: operation not permitted"
    assert (report.captured, report.eager) == ({}, dict.fromkeys(range(M), why))
    assert "experts[3]: eager, cannot be captured" in str(report)
    assert not any("once more" in note for note in report.notes)
    backend.fail = None
    with replays(model, 0):
        settled(model, x, y)


def test_an_expert_whose_capture_failed_once_is_captured_when_it_was_seen_again(trained):
    model, x, y = trained(steps=MIN_SEEN - 1)
    model.executor._backend.fail = RuntimeError("another thread called CUDA")
    settled(model, x, y, 1)
    model.executor._backend.fail = None
    settled(model, x, y, 2 * MIN_SEEN - 1)
    assert model.executor_report().captured == {}
    settled(model, x, y, 1)
    report = model.executor_report()
    assert report.captured == {i: [6] for i in range(M)}
    assert report.eager == {}


def test_what_cannot_be_cleaned_up_ends_the_training(trained):
    model, x, y = trained(steps=MIN_SEEN - 1)
    model.executor._backend.fail = BrokenCaptureError("start again from the last checkpoint")
    with pytest.raises(BrokenCaptureError, match="last checkpoint"):
        settled(model, x, y, 1)


def test_the_first_capture_of_an_expert_is_of_its_largest_size_so_far(make):
    model, (x, y) = make(), batch()
    for counts in ([9, 5, 5, 5], [6] * M, [6] * M, [6] * M):
        backward(model, x, y, fixed_routing(model, counts=counts))
    assert model.executor_report().captured == {0: [6, 9], 1: [6], 2: [6], 3: [6]}
    sizes = [
        captured.size for captured in model.executor._store.records[(0, True, True)].graphs.values()
    ]
    assert sizes == [9, 6]
    for _ in range(MIN_SEEN):  # a size that comes later is captured alone
        backward(model, x, y, fixed_routing(model, counts=[7, 6, 6, 5]))
    assert model.executor_report().captured[0] == [6, 7, 9]


def test_an_expert_with_hooks_is_not_captured(make):
    model, (x, y) = make(), batch()
    calls = []
    model.experts[1][2].register_forward_hook(lambda *_: calls.append(1))
    model.experts[2][0].weight.register_hook(lambda gradient: calls.append(2))
    settled(model, x, y, 5)
    assert sorted(calls) == [1] * 5 + [2] * 5
    assert model.executor_report().eager == {
        1: "has hooks, which a replay would not call (on 2)",
        2: "has hooks on its parameters, which a replay would call a second time",
    }


def test_experts_that_are_never_captured_are_not_looked_at_any_more(make, monkeypatch):
    model, (x, y) = make(), batch()
    for expert in model.experts:
        expert[2].register_forward_hook(lambda *_: None)
    settled(model, x, y)
    assert len(model.executor_report().eager) == M
    looks, look = [], FakeBackend.random_state
    monkeypatch.setattr(FakeBackend, "random_state", lambda self: looks.append(1) or look(self))
    settled(model, x, y, 2)
    assert looks == []


def test_an_expert_that_raises_while_captured_raises_its_own_error(make):
    model, (x, y) = make(), batch()
    model.experts[2] = Faulty()
    model.experts[2].broken = False
    settled(model, x, y, MIN_SEEN - 1)
    model.experts[2].broken = True
    with pytest.raises(RuntimeError, match="out of luck"):
        backward(model, x, y, fixed_routing(model))
    model.experts[2].broken = False
    backward(model, x, y, fixed_routing(model))
    assert all(p.grad.isfinite().all() for p in model.experts.parameters())


def test_out_of_memory_drops_the_graphs_and_training_goes_on(trained):
    model, x, y = trained()
    buffers = M * 24 * 3 * 8 * 8 * 4  # of 24 rows of float32 for each expert
    assert model.executor_report().memory == 200 * M + buffers
    model.executor._backend.fail = torch.OutOfMemoryError("CUDA out of memory")
    settled(model, x, y, counts=[3, 7, 7, 7])
    report = model.executor_report()
    assert (report.memory, report.captured, report.eager) == (0, {}, {})
    assert "out of memory while capturing" in report.notes[0]
    model.executor._backend.fail = None
    settled(model, x, y)
    assert model.executor_report().captured == {}
    assert all(p.isfinite().all() for p in model.parameters())


def test_over_budget_the_least_recently_used_expert_loses_its_graphs(trained, no_estimate):
    # A pair of graphs holds 200 bytes here, and 768 for each of its rows: four of six rows fit.
    model, x, y = trained(budget=22_000)
    assert model.executor_report().captured == {i: [6] for i in range(M)}
    settled(model, x, y, counts=[9, 6, 6, 3])
    # Expert 3 was replayed least recently when expert 0 at 9 came, and must now be seen six times.
    assert model.executor_report().captured == {0: [6, 9], 1: [6], 2: [6]}
    assert model.executor_report().memory == 4 * 200 + (9 + 6 + 6 + 6) * 768
    settled(model, x, y, 4, [9, 6, 6, 3])
    assert model.executor_report().memory == 4 * 200 + (9 + 6 + 6 + 6) * 768
    backward(model, x, y, fixed_routing(model, counts=[9, 6, 6, 3]))
    assert model.executor_report().captured == {1: [6], 2: [6], 3: [3]}
    assert model.executor_report().memory == 3 * 200 + (6 + 6 + 3) * 768


def test_small_groups_and_training_mode_without_gradients_run_eagerly(trained):
    model, x, y = trained()
    with replays(model, 0):
        for _ in range(MIN_SEEN + 1):
            with torch.no_grad():
                model(x, routing=fixed_routing(model))  # with batch statistics
        model.min_group = 7
        backward(model, x, y, fixed_routing(model))
    assert model.executor_report().captured_predictions == {}


def test_experts_in_evaluation_mode_are_trained_by_graphs_of_their_own(trained):
    model, x, y = trained()
    model.experts.eval()  # BatchNorm keeps its statistics, and rows can be padded
    with replays(model, 2 * M):
        settled(model, x, y, MIN_SEEN + 1)
    padded = {i: sorted([*SIZES_AROUND_SIX, 6]) for i in range(M)}
    assert model.executor_report().captured == padded

    def run(model):
        backward(model, x, y, fixed_routing(model))

    with replays(model, 2 * M):
        # float32, padded batches are summed in another order
        assert_as_sequential(model, run, rtol=1e-5, atol=1e-6)
        model.experts.train()
        run(model)  # those of training mode are still there
