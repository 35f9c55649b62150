"""A backward pass that is still to come keeps what its graphs read, whatever ran since then.

All graphs of an expert read the same buffers: of both modes, and those of a record that has been
replaced or has lost its graphs.
"""

import pytest
from support.graphs import (
    FakeBackend,
    assert_close,
    backward,
    doubles,
    fixed_routing,
    grads,
    norm_expert,
    replays,
    row_wise_expert,
)
from support.models import M
from support.tape_backend import TapeBackend

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN

BACKENDS = pytest.mark.parametrize("backend", [TapeBackend, FakeBackend])
EXPERTS = pytest.mark.parametrize("expert", [norm_expert, row_wise_expert])


def loss_of(model, seed):
    x, y = doubles(seed=seed)
    return hp.HubPathwayLoss()(model(x, routing=fixed_routing(model)), y).total


def settle(model, twin, modes=(True,)):
    x, y = doubles()
    for mode in modes:
        for each in (model, twin):
            each.experts.train(mode)
            for _ in range(MIN_SEEN + 1):
                backward(each, x, y, fixed_routing(each))
    for each in (model, twin):
        each.zero_grad()


def as_without_graphs(model, twin, between, after=lambda each: None):
    """The backward pass of a step, with another step in between, gives what it gives eagerly.

    between: what happens to the model before the second step; after: once that was run."""
    for each in (model, twin):
        each.experts.train()
        first = loss_of(each, 1)
        between(each)
        second = loss_of(each, 2)
        after(each)
        first.backward()
        second.backward()
    assert_close(grads(model), grads(twin))


@BACKENDS
@EXPERTS
def test_a_forward_in_the_other_mode_leaves_it_its_rows(pair, expert, backend):
    model, twin = pair(expert, backend)
    settle(model, twin, (True, False))
    with replays(model, M):  # of the first step
        as_without_graphs(model, twin, lambda each: each.experts.eval())
    with replays(model, 2 * M):  # nothing waits any more
        for mode in (True, False):
            model.experts.train(mode)
            loss_of(model, 3).backward()


@BACKENDS
@EXPERTS
def test_a_forward_after_freezing_leaves_it_its_rows(pair, expert, backend):
    model, twin = pair(expert, backend)
    settle(model, twin)

    def freeze(each, frozen=True):
        for expert in each.experts:
            expert[0].bias.requires_grad_(not frozen)

    as_without_graphs(model, twin, freeze, lambda each: freeze(each, False))


@BACKENDS
@EXPERTS
def test_a_forward_after_an_eviction_leaves_it_its_rows(pair, expert, backend):
    model, twin = pair(expert, backend)
    settle(model, twin)

    def evict(each):
        if each is model:
            for record in model.executor._store.records.values():
                record.drop()

    as_without_graphs(model, twin, evict)


@BACKENDS
def test_graphs_that_are_captured_meanwhile_are_replayed_after_it(pair, backend):
    model, twin = pair(norm_expert, backend)
    settle(model, twin)
    x, y = doubles(seed=4)
    first = [loss_of(each, 1) for each in (model, twin)]
    for each in (model, twin):
        each.experts.eval()
    with replays(model, 0):
        for _ in range(MIN_SEEN + 1):
            for each in (model, twin):
                backward(each, x, y, fixed_routing(each))
    assert any(not use.training for use, r in model.executor._store.records.items() if r.graphs)
    for loss in first:
        loss.backward()
    with replays(model, M):
        for each in (model, twin):
            backward(each, x, y, fixed_routing(each))
    assert_close(grads(model), grads(twin))


def test_a_larger_batch_leaves_it_its_rows(pair):
    model, twin = pair(norm_expert)
    settle(model, twin)
    x, y = doubles(40, seed=5)
    for each in (model, twin):
        first = loss_of(each, 1)
        routing = fixed_routing(each, counts=[10] * M)
        second = hp.HubPathwayLoss()(each(x, routing=routing), y).total
        first.backward()
        second.backward()
    assert_close(grads(model), grads(twin))
