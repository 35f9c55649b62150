"""The logic of captured graphs, without a GPU: a stand-in backend that replays by running again."""

import copy
import gc
from collections import Counter

import pytest
import torch
from graphs_cases import (
    FakeBackend,
    assert_same,
    backward,
    fixed_routing,
    grads,
    row_wise_expert,
    settled,
)
from test_executors import C, Faulty, M, batch, build, conv_expert, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hubpath_fast as hp
from hubpath_fast.model.executors import make_executor
from hubpath_fast.model.executors.backend import BrokenCaptureError
from hubpath_fast.model.executors.capture import CapturedExpert, Pool
from hubpath_fast.model.executors.graphs import MIN_SEEN


def test_training_is_the_same_to_the_bit_with_dropout_and_batch_norm(make, monkeypatch):
    graphs = make()
    state = train(graphs, 20)
    report = graphs.executor_report()
    assert report.hits > 20
    assert report.hits + report.misses == 20 * M
    assert sum(map(len, report.captured.values())) == graphs._running._backend.captures / 2
    assert f"graphs: {report.hits} groups replayed" in str(report)
    monkeypatch.undo()
    assert_same(state, train(build(), 20))


def test_a_capture_moves_no_buffer_no_row_and_no_random_state():
    expert, (x, _) = conv_expert(), batch()
    expert.insert(0, nn.ReLU(inplace=True))
    inputs = x[:8] - 0.5
    kept = inputs.clone()
    before = {name: b.clone() for name, b in expert.named_buffers()}
    random = torch.get_rng_state()
    captured = CapturedExpert(expert, inputs[:6], inputs, Pool(None), FakeBackend(None))
    assert captured.draws  # Dropout
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs, kept)
    assert_same(dict(expert.named_buffers()), before)


def test_micro_batches_add_up(make, monkeypatch):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    hits = model.executor_report().hits
    torch.manual_seed(5)
    for _ in range(2):
        backward(model, x, y, fixed_routing(model))
    assert model.executor_report().hits == hits + 2 * M
    twin = build()
    twin.load_state_dict(model.state_dict())
    monkeypatch.undo()
    torch.manual_seed(5)
    for _ in range(2):
        backward(twin, x, y, fixed_routing(twin))
    assert_same(grads(model), grads(twin))


def test_gradients_are_not_the_buffers_that_the_next_replay_writes(make):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    weight, found = model.experts[0][0].weight, []
    for scale in (1.0, 3.0):
        out = model(x, routing=fixed_routing(model))
        [grad] = torch.autograd.grad(out.expert_outputs.square().sum() * scale, weight)
        found.append((grad, grad.clone()))
        del out  # experts 1 to 3 wait for a backward until then
    assert model.executor_report().hits == 3 * M
    assert torch.equal(*found[0])
    assert not torch.equal(found[0][0], found[1][0])


def test_two_forwards_before_a_backward_are_right(make, monkeypatch):
    model, (x, y) = make(row_wise_expert), batch()
    settled(model, x, y)
    hits = model.executor_report().hits
    criterion = hp.HubPathwayLoss()
    first, second = (model(part, routing=fixed_routing(model)) for part in (x, x.flip(0)))
    assert model.executor_report().hits == hits + M  # the second ran eagerly
    (criterion(first, y).total + criterion(second, y).total).backward()
    found = grads(model)
    monkeypatch.undo()
    model._running = None
    model.zero_grad(set_to_none=True)
    first, second = (model(part, routing=fixed_routing(model)) for part in (x, x.flip(0)))
    (criterion(first, y).total + criterion(second, y).total).backward()
    for name, value in grads(model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


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
def test_a_changed_expert_is_captured_anew(make, name):
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
    executor = model._running
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
    model._running._backend.fail = RuntimeError("another thread called CUDA")
    settled(model, x, y, 1)
    model._running._backend.fail = None
    settled(model, x, y, 2 * MIN_SEEN - 1)
    assert model.executor_report().captured == {}
    settled(model, x, y, 1)
    report = model.executor_report()
    assert report.captured == {i: [6] for i in range(M)}
    assert report.eager == {}


def test_what_cannot_be_cleaned_up_ends_the_training(make):
    model, (x, y) = make(), batch()
    settled(model, x, y, MIN_SEEN - 1)
    model._running._backend.fail = BrokenCaptureError("start again from the last checkpoint")
    with pytest.raises(BrokenCaptureError, match="last checkpoint"):
        settled(model, x, y, 1)


def test_an_expert_that_uses_a_foreign_tensor_is_not_captured_since_that_would_get_no_gradient(
    make,
):
    outside = torch.ones(3, requires_grad=True)

    class Foreign(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * outside.sum()

    model, (x, y) = make(lambda: Foreign(*row_wise_expert())), batch()
    settled(model, x, y, 4 * MIN_SEEN)
    report = model.executor_report()
    assert report.captured == {}
    assert "uses a tensor [3] that requires a gradient" in report.eager[0]
    outside.grad = None
    backward(model, x, y, fixed_routing(model))
    assert outside.grad.isfinite().all()


def test_a_recurrent_expert_is_captured_though_its_layers_keep_lists_of_their_weights(make):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.GRU(8, 5, batch_first=True), nn.Linear(5, C)

        def forward(self, x):
            return self.head(self.layer(x.flatten(1, 2))[0][:, -1])

    model, (x, y) = make(Recurrent), batch()
    settled(model, x, y, MIN_SEEN + 1)
    assert model.executor_report().hits == 2 * M
    backward(model, x, y, fixed_routing(model))
    found = grads(model)
    model.zero_grad(set_to_none=True)
    model._running = make_executor("sequential")
    model._running.name = "graphs"  # as the fixture makes the model choose
    backward(model, x, y, fixed_routing(model))
    assert_same(found, grads(model))


def test_the_first_capture_of_an_expert_is_of_its_largest_size_so_far(make):
    model, (x, y) = make(), batch()
    for counts in ([9, 5, 5, 5], [6] * M, [6] * M, [6] * M):
        backward(model, x, y, fixed_routing(model, counts=counts))
    assert model.executor_report().captured == {0: [6, 9], 1: [6], 2: [6], 3: [6]}
    sizes = [captured.size for captured in model._running._records[(0, True, True)].graphs.values()]
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


def test_a_hook_on_a_parameter_ends_the_use_of_graphs(make):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    calls, hits = [], model.executor_report().hits
    model.experts[2][0].weight.register_hook(calls.append)
    for _ in range(3):
        backward(model, x, y, fixed_routing(model))
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
    places = M * 24 * 3 * 8 * 8 * 4  # of 24 rows of float32 for each expert
    assert model.executor_report().memory == 200 * M + places
    model._running._backend.fail = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(MIN_SEEN):
        backward(model, x, y, fixed_routing(model, counts=[3, 7, 7, 7]))
    report = model.executor_report()
    assert (report.memory, report.captured, report.eager) == (0, {}, {})
    assert "out of memory while capturing" in report.notes[0]
    model._running._backend.fail = None
    settled(model, x, y)
    assert model.executor_report().captured == {}
    assert all(p.isfinite().all() for p in model.parameters())


def test_over_budget_the_least_recently_used_expert_loses_its_graphs(make):
    model, (x, y) = make(budget=900), batch()  # a pair of graphs holds 200 here: four fit
    settled(model, x, y)
    assert model.executor_report().captured == {i: [6] for i in range(M)}
    for _ in range(MIN_SEEN):
        backward(model, x, y, fixed_routing(model, counts=[9, 6, 6, 3]))
    # Expert 3 was replayed least recently when expert 0 at 9 came, and must now be seen six times.
    assert model.executor_report().captured == {0: [6, 9], 1: [6], 2: [6]}
    assert model.executor_report().memory == 800
    for _ in range(4):
        backward(model, x, y, fixed_routing(model, counts=[9, 6, 6, 3]))
    assert model.executor_report().memory == 800
    backward(model, x, y, fixed_routing(model, counts=[9, 6, 6, 3]))
    assert model.executor_report().captured == {1: [6], 2: [6], 3: [3]}
    assert model.executor_report().memory == 600


class Assorted(nn.Module):
    """Parameters of several layouts and dtypes; one is not used."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(4, 3, 3, 3).to(memory_format=torch.channels_last))
        self.wide = nn.Parameter(torch.rand(4, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.rand(()))
        self.turned = nn.Parameter(torch.rand(7, 4).t())
        self.spare = nn.Parameter(torch.rand(2))

    def forward(self, x):
        pooled = nn.functional.conv2d(x, self.kernel).mean((2, 3)) * self.wide.float()
        return pooled @ self.turned * self.scalar


def test_handed_out_gradients_have_their_parameters_layout_and_memory_of_their_own():
    expert, (x, _) = Assorted(), batch()
    captured = CapturedExpert(expert, x[:6], x[:6].clone(), Pool(None), FakeBackend(None))
    found = []
    for rows in (x[:6], x[6:12]):
        d_output = torch.rand(6, 7)
        given = torch.autograd.grad(
            captured(rows), expert.parameters(), d_output, allow_unused=True
        )
        right = torch.autograd.grad(expert(rows), expert.parameters(), d_output, allow_unused=True)
        found.append((given, right))
    for given, right in found:  # after the second: it may not have touched the first
        for name, parameter, a, b in zip(
            dict(expert.named_parameters()), expert.parameters(), given, right, strict=True
        ):
            assert (a is None) == (b is None) == (name == "spare")
            if a is not None:
                same = parameter.dtype, parameter.shape, parameter.stride()
                assert (a.dtype, a.shape, a.stride()) == same, name
                assert torch.equal(a, b), name


def test_a_gradient_is_copied_once(make):
    model, (x, y) = make(), batch()
    settled(model, x, y)
    loss = hp.HubPathwayLoss()(model(x, routing=fixed_routing(model)), y).total
    with Copies() as copies:
        loss.backward()
    weight = model.experts[0][0].weight
    # The stand-in's replay copies into its static results, once; what is handed out is the other.
    assert copies.of[weight.shape] == 2 * M


class Copies(TorchDispatchMode):
    """of: shape -> how many tensors of that shape were written by a copy."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._foreach_copy_):
            written = args[0] if isinstance(args[0], list) else [args[0]]
            self.of.update(tensor.shape for tensor in written)
        if func.overloadpacket == torch.ops.aten.clone:
            self.of[args[0].shape] += 1
        return func(*args, **(kwargs or {}))


AUTOCAST_SEEN: list[bool] = []


class Recording(torch.autograd.Function):
    """The identity; its backward notes whether it runs in autocast."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        AUTOCAST_SEEN.append(torch.is_autocast_enabled("cpu"))
        return grad


def test_a_backward_is_captured_outside_of_autocast_as_it_is_run_eagerly(make):
    class Expert(nn.Sequential):
        def forward(self, x):
            return Recording.apply(super().forward(x))

    model, (x, y) = make(lambda: Expert(*row_wise_expert())), batch()
    AUTOCAST_SEEN.clear()
    for _ in range(1 + MIN_SEEN):  # after the first, rows are gathered in autocast's precision
        with torch.autocast("cpu", torch.bfloat16):
            loss = hp.HubPathwayLoss()(model(x, routing=fixed_routing(model)), y).total
        loss.backward()
    assert model.executor_report().captured == {i: [8] for i in range(M)}
    # Three eager backwards for each expert, then one to warm up, one captured and one replayed.
    assert AUTOCAST_SEEN == [False] * M * 6


def test_a_parameter_that_is_not_used_gets_no_gradient(make, monkeypatch):
    def expert():
        made = row_wise_expert()
        made.spare = nn.Parameter(torch.ones(3))
        return made

    class Ignoring(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model, (x, y) = make(lambda: Ignoring(expert(), nn.Linear(2, 2))), batch()
    settled(model, x, y, MIN_SEEN + 1)
    assert model.executor_report().hits == 2 * M
    backward(model, x, y, fixed_routing(model))
    found = grads(model)
    assert all(found[f"experts.{i}.{name}"] is None for i in range(M) for name in ("1.weight",))
    assert found["experts.0.0.spare"] is None
    monkeypatch.undo()
    model._running = None
    model.zero_grad(set_to_none=True)
    backward(model, x, y, fixed_routing(model))
    assert_same(found, grads(model))


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


def test_experts_in_evaluation_mode_are_trained_by_graphs_of_their_own(make, monkeypatch):
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
    monkeypatch.undo()
    model._running = None
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    model.experts.eval()
    backward(model, x, y, fixed_routing(model))
    for name, value in grads(model).items():
        if value is not None:  # float32, padded batches are summed in another order
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_experts_have_no_captured_backward(make):
    model, (x, y) = make(), batch()
    model.experts.requires_grad_(False)
    settled(model, x, y, MIN_SEEN + 1)
    assert model.executor_report().hits == 2 * M
    assert model._running._backend.captures == M
    assert all(p.grad is None for p in model.experts.parameters())
