"""The logic of captured graphs, without a GPU: a stand-in backend that replays by running again."""

import copy
import gc

import pytest
import torch
from support.graphs import (
    FakeBackend,
    assert_same,
    backward,
    fixed_routing,
    grads,
    settled,
)
from support.models import Faulty, M, batch, build, conv_expert, train
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN
from hubpath_fast.executors.graphs.backend import BrokenCaptureError
from hubpath_fast.executors.graphs.capture import CapturedModule, Pool


def test_training_is_the_same_to_the_bit_with_dropout_and_batch_norm(make):
    graphs = make()
    state = train(graphs, 20)
    report = graphs.executor_report()
    assert report.hits > 20
    assert report.hits + report.misses == 20 * M
    generator = 1  # at the one size of all batches
    graphs_made = sum(map(len, report.captured.values())) + generator
    assert graphs_made == graphs.executor._backend.captures / 2  # forward and backward
    assert "the generator: training at sizes [24]" in report.notes
    assert f"graphs: {report.hits} groups replayed" in str(report)
    assert_same(state, train(build(), 20))


def test_a_capture_moves_no_buffer_no_row_and_no_random_state():
    expert, (x, _) = conv_expert(), batch()
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


def test_a_dropped_output_frees_the_graph_and_a_second_backward_raises(make):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    hits = model.executor_report().hits
    out = model(x, routing=fixed_routing(model))
    del out
    gc.collect()
    loss = hp.HubPathwayLoss()(model(x, routing=fixed_routing(model)), y).total
    assert model.executor_report().hits == hits + 2 * M
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


class OtherReLU(nn.ReLU):
    """With the same settings."""


CHANGES = {
    "storage": lambda model: setattr(model.experts[0][0].weight, "data",
                                     model.experts[0][0].weight.data.clone()),
    "mode": lambda model: model.experts[0][1].eval(),
    "rate": lambda model: setattr(model.experts[0][3], "p", 0.5),
    "layer": lambda model: model.experts[0].__setitem__(2, OtherReLU()),
    "frozen": lambda model: model.experts[0][0].requires_grad_(False),
    "another expert": lambda model: model.experts.__setitem__(0, conv_expert()),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_expert_is_captured_again(make, name):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    CHANGES[name](model)
    before = model.executor_report()
    settled(model, x, y, 1)
    after = model.executor_report()
    assert after.misses == before.misses + 1
    assert 0 not in after.captured
    settled(model, x, y, MIN_SEEN - 1)
    assert model.executor_report().captured[0] == [6]


def test_an_expert_that_cannot_be_captured_runs_eagerly_and_is_named(make):
    model, (x, y) = make(), batch()
    executor = model.executor
    settled(model, x, y, 1)
    executor._backend.fail = RuntimeError("operation not permitted\nwhen stream is capturing")
    settled(model, x, y)
    report = model.executor_report()
    assert (report.captured, report.eager) == ({}, {})
    failure = "a capture failed (RuntimeError: operation not permitted); it is tried once more"
    assert f"experts[3]: {failure}" in report.notes
    settled(model, x, y, 2 * MIN_SEEN)
    report = model.executor_report()
    assert report.captured == {}
    assert report.eager == dict.fromkeys(
        range(M), "cannot be captured: RuntimeError: operation not permitted"
    )
    assert "experts[3]: eager, cannot be captured" in str(report)
    assert not any("once more" in note for note in report.notes)
    executor._backend.fail = None
    settled(model, x, y)
    assert model.executor_report().hits == 0


def test_an_expert_whose_capture_failed_once_is_captured_when_it_was_seen_again(make):
    model, (x, y) = make(), batch()
    settled(model, x, y, MIN_SEEN - 1)
    model.executor._backend.fail = RuntimeError("another thread called CUDA")
    settled(model, x, y, 1)
    model.executor._backend.fail = None
    settled(model, x, y, 2 * MIN_SEEN - 1)
    assert model.executor_report().captured == {}
    settled(model, x, y, 1)
    report = model.executor_report()
    assert report.captured == {i: [6] for i in range(M)}
    assert report.eager == {}


def test_what_cannot_be_cleaned_up_ends_the_training(make):
    model, (x, y) = make(), batch()
    settled(model, x, y, MIN_SEEN - 1)
    model.executor._backend.fail = BrokenCaptureError("start again from the last checkpoint")
    with pytest.raises(BrokenCaptureError, match="last checkpoint"):
        settled(model, x, y, 1)


def test_the_first_capture_of_an_expert_is_of_its_largest_size_so_far(make):
    model, (x, y) = make(), batch()
    for counts in ([9, 5, 5, 5], [6] * M, [6] * M, [6] * M):
        backward(model, x, y, fixed_routing(model, counts=counts))
    assert model.executor_report().captured == {0: [6, 9], 1: [6], 2: [6], 3: [6]}
    sizes = [captured.size for captured in model.executor._records[(0, True, True)].graphs.values()]
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


def test_a_hook_on_a_parameter_ends_the_use_of_graphs(make):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    calls, hits = [], model.executor_report().hits
    model.experts[2][0].weight.register_hook(calls.append)
    settled(model, x, y, 3)
    assert (len(calls), model.executor_report().hits) == (3, hits + 3 * (M - 1))


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


def test_out_of_memory_drops_the_graphs_and_training_goes_on(make):
    model, (x, y) = make(), batch()
    settled(model, x, y)
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


def test_over_budget_the_least_recently_used_expert_loses_its_graphs(make):
    # A pair of graphs holds 200 bytes here, and 768 for each of its rows: four of six rows fit.
    model, (x, y) = make(budget=22_000), batch()
    settled(model, x, y)
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


def test_small_groups_and_training_mode_without_gradients_run_eagerly(make):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    hits = model.executor_report().hits
    for _ in range(MIN_SEEN + 1):
        with torch.no_grad():
            model(x, routing=fixed_routing(model))  # with batch statistics
    assert model.executor_report().hits == hits
    assert model.executor_report().captured_predictions == {}
    model.min_group = 7
    backward(model, x, y, fixed_routing(model))
    assert model.executor_report().hits == hits


def test_experts_in_evaluation_mode_are_trained_by_graphs_of_their_own(make):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    hits = model.executor_report().hits
    model.experts.eval()  # BatchNorm keeps its statistics, and rows can be padded
    settled(model, x, y, MIN_SEEN + 1)
    assert model.executor_report().hits == hits + 2 * M
    assert model.executor_report().captured == {i: [6, 8] for i in range(M)}
    backward(model, x, y, fixed_routing(model))
    found, state = grads(model), copy.deepcopy(model.state_dict())
    model.experts.train()
    backward(model, x, y, fixed_routing(model))
    assert model.executor_report().hits == hits + 4 * M  # those of training mode are still there
    model.executor = "sequential"
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    model.experts.eval()
    backward(model, x, y, fixed_routing(model))
    for name, value in grads(model).items():
        if value is not None:  # float32, padded batches are summed in another order
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
