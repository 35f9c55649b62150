"""What captured graphs may take: estimated before, counted after."""

import pytest
import torch
from support.graphs import (
    SIZES_AROUND_SIX,
    FakeBackend,
    assert_same,
    backward,
    exact_expert,
    fixed_routing,
    norm_expert,
    replays,
    row_wise_expert,
    settled,
)
from support.models import M, batch
from torch import nn

from hubpath_fast.executors import SequentialExecutor, choice, of_model
from hubpath_fast.executors.graphs import MIN_SEEN, GraphsExecutor
from hubpath_fast.executors.graphs.footprint import Footprint

pytestmark = pytest.mark.usefixtures("user_cache")
ROW = 3 * 8 * 8 * 4  # bytes, of float32


def kept(expert, rows=6):
    """Bytes that autograd keeps of each row."""
    with Footprint(expert, x := batch()[0][:rows]) as found:
        output = expert(x)
    del output
    return found.nbytes / rows


@pytest.mark.parametrize(("expert", "largest"), [(row_wise_expert, 12), (exact_expert, 6)])
def test_graphs_that_would_not_fit_are_not_begun(make, expert, largest):
    needed = M * (kept(expert()) * largest + ROW * 24)
    x, y = batch()
    for budget, fits in ((needed, True), (needed - 1, False)):
        model = settled(make(expert, budget=int(budget)), x, y, MIN_SEEN + 1)
        assert (model.executor_report().captured != {}) == fits
        assert (model.executor.obstacle is None) == fits
        assert (model.executor_report().hits > 0) == fits


def test_what_does_not_fit_is_said_and_training_goes_on(make):
    model, (x, y) = make(norm_expert, budget=10_000), batch()
    settled(model, x, y, MIN_SEEN + 1)
    report = model.executor_report()
    assert (report.hits, report.misses) == (0, 4 * M)
    why = "the experts' graphs would need some 0.0 GiB, and may take 0.0 GiB: nothing is captured"
    assert report.notes == (why,)
    assert model.executor.obstacle == why
    assert (report.memory, model.executor._backend.captures) == (0, 0)
    model.warm_up(x)
    assert model.executor._backend.captures == 0


def test_a_model_that_is_warmed_up_and_does_not_fit_is_left_as_it_was(make):
    model, (x, _) = make(norm_expert, budget=10_000), batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = model.warm_up(x)
    assert "may take" in report.notes[0]
    assert model.executor.obstacle is not None
    assert model.executor._backend.captures == 0
    assert_same(model.state_dict(), before)


def test_auto_turns_to_another_executor_after_the_warm_up_not_within_it(make, monkeypatch):
    def on_cuda(work, experts, obstacle=None):
        return choice._on_cuda(work.samples, experts, obstacle)

    kinds = {
        "graphs": lambda: GraphsExecutor(FakeBackend, 10_000),
        "sequential": SequentialExecutor,
    }
    monkeypatch.setattr(choice, "by_rule", on_cuda)
    monkeypatch.setattr(of_model, "make_executor", lambda name: kinds[name]())
    model, (x, _) = make(norm_expert), batch()
    model.executor = "auto"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = model.warm_up(x)
    assert_same(model.state_dict(), before)
    assert (report.executor, report.steps) == ("sequential", 0)
    assert "nothing is captured" in report.reasons[0]


class Standardised(nn.Conv2d):
    """Its weights are computed at each call, and kept for the backward pass."""

    row_wise = True

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight * weight.std() * 2, self.bias)


def standardised_expert():
    return nn.Sequential(
        Standardised(3, 400, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(400, 6)
    )


def test_what_does_not_grow_with_the_rows_is_counted_once(make):
    expert = standardised_expert()
    few, many = (kept(expert, rows) * rows for rows in (2, 10))
    per_row, largest = (many - few) / 8, 24
    needed = M * (many + per_row * (largest - 10) + ROW * 24)
    assert needed < 0.9 * M * (few / 2 * largest + ROW * 24)  # as if all of it grew
    model, (x, y) = make(standardised_expert, budget=int(needed)), batch()
    for counts in ([2, 10, 2, 10], [10, 2, 10, 2], [6, 6, 6, 6]):
        backward(model, x, y, fixed_routing(model, counts=counts))
    assert model.executor.obstacle is None
    assert set(model.executor_report().captured) == set(range(M))


def test_a_group_that_is_too_small_to_be_replayed_says_nothing(make):
    model, (x, y) = make(norm_expert), batch()
    backward(model, x, y, fixed_routing(model, counts=[1, 1, 11, 11]))
    records = model.executor._store.of_experts(True)
    assert [sorted(record.kept) for record in records] == [[], [], [11], [11]]


@pytest.fixture
def looks(monkeypatch):
    """One for each run that is looked at."""
    found = []
    enter = Footprint.__enter__

    def spy(self):
        found.append(1)
        return enter(self)

    monkeypatch.setattr(Footprint, "__enter__", spy)
    return found


def test_an_expert_is_looked_at_once_and_not_where_the_caller_looks_itself(make, looks):
    model, (x, y) = make(norm_expert), batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        settled(model, x, y, 1)
    assert looks == []
    settled(model, x, y, MIN_SEEN)
    assert looks == [1] * M


def test_an_expert_is_looked_at_twice_where_its_rows_differ_and_in_a_warm_up(make, looks):
    model, (x, y) = make(exact_expert), batch()
    for counts in ([6, 6, 6, 6], [5, 7, 5, 7], [4, 8, 4, 8], [3, 9, 3, 9]):
        settled(model, x, y, 1, counts)
    assert looks == [1] * 2 * M
    make(norm_expert).warm_up(x)
    assert looks == [1] * 4 * M


def test_a_warm_up_tells_apart_what_does_not_grow_with_the_rows(make):
    model, (x, _) = make(standardised_expert), batch()
    model.route = lambda x, *_: fixed_routing(model)
    model.warm_up(x)
    expert = standardised_expert()
    for record in model.executor._store.of_experts(True):
        assert record.kept == {rows: kept(expert, rows) * rows for rows in (3, 6)}


def test_over_budget_padded_experts_lose_all_sizes_and_get_them_back(make, no_estimate):
    # Three pairs of graphs hold 600 bytes here, and 768 for each of the 24 rows that they read.
    held = 3 * 200 + sum(SIZES_AROUND_SIX) * ROW
    model, (x, y) = make(norm_expert, budget=2 * held), batch()
    settled(model, x, y)
    # Experts 0 and 1 had to give way to 2 and 3 at once.
    assert model.executor_report().captured == dict.fromkeys((2, 3), SIZES_AROUND_SIX)
    assert model.executor_report().memory == 2 * held
    with replays(model, 2 * (2 * MIN_SEEN - 1)):
        settled(model, x, y, 2 * MIN_SEEN - 1)
    backward(model, x, y, fixed_routing(model))
    assert model.executor_report().captured == dict.fromkeys((0, 1), SIZES_AROUND_SIX)


def test_the_buffers_are_of_the_largest_batch(make):
    model, (x, y) = make(norm_expert), batch(n=22)
    settled(model, x, y, counts=[6, 6, 6, 4])
    assert model.executor._store.buffers[True].rows.shape == (M * 22, 3, 8, 8)
    assert max(map(max, model.executor_report().captured.values())) <= 22


def test_a_frozen_hub_keeps_nothing_and_is_captured(make):
    model, (x, y) = make(lambda: nn.Sequential(*norm_expert())), batch()
    model.experts.requires_grad_(False)
    settled(model, x, y, MIN_SEEN + 1)
    assert model.executor_report().hits == 2 * M
