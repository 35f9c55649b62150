"""What ``model.warm_up`` captures, and what it leaves as it was."""

import copy

import pytest
import torch
from support.graphs import (
    FakeBackend,
    Mixing,
    assert_close,
    assert_same,
    backward,
    fixed_routing,
    grads,
    norm_expert,
    predict,
    replays,
)
from support.models import Faulty, M, batch, build, conv_expert
from support.tape_backend import TapeBackend

import hubpath_fast as hp
from hubpath_fast.executors.graphs import GENERATOR, GraphsExecutor


def graphs_model(backend=FakeBackend, budget=None):
    """A model whose generator and experts run as fake graphs."""
    return build(GraphsExecutor(backend, budget))


def state(model):
    """All that a step may change."""
    tensors = dict(model.state_dict(keep_vars=True))
    return {name: tensor.detach().clone() for name, tensor in tensors.items()} | {
        "random state": torch.get_rng_state()
    }


def generator_sizes(model):
    return {
        use.gradients: sorted(record.graphs)
        for use, record in model.executor._store.records.items()
        if use.index == GENERATOR
    }


def test_it_captures_all_that_steps_need_largest_first_and_changes_nothing():
    model, (x, y) = graphs_model(), batch()
    hp.HubPathwayLoss()(model(x), y).total.backward()  # with gradients, and one step of all
    before, gradients = state(model), grads(model)
    report = model.warm_up(x)
    assert_same(state(model), before)
    assert_same(grads(model), gradients)
    assert set(report.captured) == set(range(M))
    assert generator_sizes(model) == {True: [24]}
    assert (report.steps, report.hits, report.misses) == (1, 0, M)
    for use, record in model.executor._store.records.items():
        sizes = list(record.graphs)
        assert sizes == sorted(sizes, reverse=True), use


def test_steps_after_it_are_replayed_from_the_first_on_and_none_captures():
    model = graphs_model()
    model.warm_up(batch()[0])
    captures = model.executor._backend.captures
    for seed in range(20):
        x, y = batch(seed=seed)
        hp.HubPathwayLoss()(model(x), y).total.backward()
    report = model.executor_report()
    assert (report.hits, report.misses) == (20 * M, 0)
    assert model.executor._backend.captures == captures


def test_steps_after_it_give_what_they_would_without_it(pair):
    model, twin = pair(norm_expert)
    x, y = batch()
    x = x.double()
    model.warm_up(x)
    with replays(model, 5 * M):
        for counts in ([6, 6, 6, 6], [5, 7, 9, 3], [2, 10, 8, 4], [7, 5, 3, 9], [3, 3, 9, 9]):
            for each in (model, twin):
                backward(each, x, y, fixed_routing(each, counts=counts))
    assert_close(grads(model), grads(twin))
    assert_close(model.state_dict(), twin.state_dict())


def test_in_autocast_the_first_step_is_replayed_too():
    model, (x, y) = graphs_model(TapeBackend), batch()
    with torch.autocast("cpu", torch.bfloat16):
        model.warm_up(x)
        loss = hp.HubPathwayLoss()(model(x), y).total
    loss.backward()
    assert model.executor_report().hits == M


def test_an_expert_without_rows_in_the_batch_is_ready_for_a_few(pair):
    model, _ = pair(norm_expert)
    x, y = (each.double() if each.is_floating_point() else each for each in batch())
    model.route = lambda x, *_: fixed_routing(model, counts=[16, 8, 0, 0])
    report = model.warm_up(x)
    assert report.captured[3] == report.captured[2] == [4]
    assert max(report.captured[0]) == 24
    with replays(model, M):
        backward(model, x, y, fixed_routing(model, counts=[12, 8, 2, 2]))


def test_in_evaluation_it_captures_the_predictions_of_the_batch(make):
    model, (x, _) = make(conv_expert), batch()
    model.route = lambda x, *_: fixed_routing(model, counts=[9, 7, 8, 0])
    before = state(model)
    with torch.no_grad():
        report = model.eval().warm_up(x)
    assert report.captured_predictions == {0: [12], 1: [8], 2: [8]}
    assert report.captured == {}
    assert_same(state(model), before)
    with replays(model, 3):
        predict(model, x, [9, 7, 8, 0])


def test_exact_sizes_are_those_of_the_batch(make):
    model, (x, _) = make(lambda: Mixing(*conv_expert())), batch()
    model.route = lambda x, *_: fixed_routing(model, counts=[9, 8, 1, 6])
    assert model.warm_up(x).captured == {0: [9], 1: [8], 3: [6]}


def test_again_it_adds_what_is_missing_only():
    model, (x, _) = graphs_model(), batch()
    model.warm_up(x)
    captures = model.executor._backend.captures
    model.route = lambda x, *_: fixed_routing(model, counts=[6, 6, 6, 6])
    first = copy.deepcopy(model.executor_report().captured)
    second = model.warm_up(x).captured
    assert all(set(first[i]) <= set(second[i]) for i in range(M))
    added = sum(len(second[i]) - len(first[i]) for i in range(M))
    assert model.executor._backend.captures == captures + 2 * added


def test_graphs_of_another_stream_are_captured_again(make):
    model, (x, _) = make(norm_expert), batch()
    model.warm_up(x)
    records = model.executor._store.of_experts(True)
    before = [set(record.graphs.values()) for record in records]
    model.executor._backend.num_streams = 2  # experts 2 and 3 were on streams 2 and 0
    model.warm_up(x)
    assert [record.stream for record in records] == [0, 1, 0, 1]
    after = [set(record.graphs.values()) for record in records]
    assert all(after)
    kept = [not a.isdisjoint(b) for a, b in zip(after, before, strict=True)]
    assert kept == [True, True, False, False]


@pytest.mark.parametrize("name", ["sequential", "auto"])
def test_other_executors_have_nothing_to_do(name):
    model, (x, _) = build(name), batch()
    before = state(model)
    report = model.warm_up(x)
    assert (report.steps, report.captured) == (0, {})
    assert_same(state(model), before)


def test_what_cannot_be_run_raises_and_leaves_the_executor_as_it_was():
    model, (x, y) = graphs_model(), batch()
    with pytest.raises(ValueError, match="empty batch"):
        model.warm_up(x[:0])
    model.experts[1] = Faulty()
    with pytest.raises(RuntimeError, match="out of luck"):
        model.warm_up(x)
    model.experts[1].broken = False
    hp.HubPathwayLoss()(model(x), y).total.backward()
    assert model.executor_report().steps == 1
