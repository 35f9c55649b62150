"""Captured experts train like sequential ones, on a stand-in whose replays run no Python code and
that overwrites what a graph may not rely on."""

import random

import pytest
import torch
from support.graphs import (
    Mixing,
    Recurrent,
    assert_close,
    backward,
    compare_steps,
    doubles,
    exact_expert,
    fixed_routing,
    grads,
    norm_expert,
    replays,
    row_wise_expert,
    settled,
)
from support.models import C, M, conv_expert
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN

KINDS = (None, "drop", "predict", "predict", "train", "train", "train", "train")


def play(model, plan, step):
    """A step's forwards, then one backward pass for all; the predictions."""
    losses, predictions = [], []
    for n, counts, kind, seed in plan:
        x, y = doubles(n, seed)
        torch.manual_seed(seed)
        routing = fixed_routing(model, n, counts)
        if kind == "predict":
            model.eval()
            with torch.inference_mode() if seed % 2 else torch.no_grad():
                predictions.append(model(x, routing=routing).clone())
            model.train()
            continue
        loss = hp.HubPathwayLoss()(model(x, routing=routing), y).total
        if kind == "train":
            losses.append(loss)
        elif kind is None:
            loss.backward()
        del loss
    torch.manual_seed(step)
    if losses:
        sum(losses).backward(retain_graph=step % 2 == 0)
    return predictions


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("expert", [row_wise_expert, norm_expert, exact_expert])
def test_anything_that_a_loop_may_do_gives_what_it_gives_one_after_another(pair, expert, seed):
    """Several sizes and batches, forwards before a backward, dropped outputs, predictions between,
    gradients that add up, and parts that are frozen and thawed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, twin = pair(expert)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (model, twin)]
    for step in range(40):
        plan = []
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            n = draw.choice([24, 24, 16, 40])
            counts = [None, [n - 12, 4, 4, 4], [4, n - 12, 4, 4], [n // 2, n // 2, 0, 0]]
            plan.append((n, draw.choice(counts), draw.choice(KINDS), draw.randrange(1000)))
        assert_close(*(play(each, plan, step) for each in (model, twin)))
        assert_close(grads(model), grads(twin))
        for optimizer in optimizers:
            optimizer.step()
        if draw.random() < 0.7:
            for optimizer in optimizers:
                optimizer.zero_grad()
        if draw.random() < 0.05:
            index = draw.randrange(M)
            for each in (model, twin):
                weight = next(each.experts[index].parameters())
                weight.requires_grad_(not weight.requires_grad)
    assert_close(model.state_dict(), twin.state_dict())
    assert model.executor_report().hits > 40


@pytest.mark.parametrize("counts", [[40, 8, 8, 8], [8, 8, 8, 40]])
def test_a_larger_batch_before_the_first_capture_gets_buffers_that_hold_its_sizes(pair, counts):
    model, twin = pair(row_wise_expert)
    large, small = doubles(64), doubles(24)
    for each in (model, twin):
        backward(each, *large, fixed_routing(each, counts=counts))
        for _ in range(MIN_SEEN):
            backward(each, *small, fixed_routing(each))
        each.zero_grad()
        backward(each, *large, fixed_routing(each, counts=counts))
    # Of 24 in a batch of 64 on average; the 40 ran eagerly.
    assert model.executor_report().captured[counts.index(40)][-1] == 36
    assert_close(grads(model), grads(twin))


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM])
def test_recurrent_layers_read_the_weights_of_today(pair, monkeypatch, layer):
    """On a GPU such a layer moves its weights to one flat memory when they were replaced."""

    def flatten(self):
        flat = torch.cat([weight.detach().reshape(-1) for weight in self._flat_weights])
        with torch.no_grad():
            for weight in self._flat_weights:
                own, flat = flat[: weight.numel()], flat[weight.numel() :]
                weight.set_(own.view_as(weight))

    model, twin = pair(lambda: Recurrent(layer))
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten)
    compare_steps(model, twin, 2 * MIN_SEEN)
    assert model.executor_report().hits == (MIN_SEEN + 1) * M


class Moving(nn.Linear):
    """Moves a weight to memory of its own when it meets it first."""

    met = None

    def forward(self, x):
        if self.met is not self.weight:
            with torch.no_grad():
                self.weight.set_(self.weight.detach().clone())
            self.__dict__["met"] = self.weight
        return super().forward(x)


def test_an_expert_that_moves_its_weights_is_not_captured(pair):
    model, twin = pair(lambda: nn.Sequential(nn.Flatten(), Moving(192, C)))
    compare_steps(model, twin, 4 * MIN_SEEN)
    assert model.executor_report().captured == {}


@pytest.mark.parametrize("expert", [norm_expert, lambda: Mixing(*norm_expert())])
def test_a_capture_between_a_forward_and_its_backward_leaves_what_that_needs(pair, expert):
    model, twin = pair(expert)
    criterion = hp.HubPathwayLoss()
    for each in (model, twin):
        x, y = doubles()
        backward(each, x, y, fixed_routing(each))
        for _ in range(2):  # the second forward of the first round is the third of its size
            outs = [each(part, routing=fixed_routing(each)) for part in (x, x.flip(0))]
            sum(criterion(out, y).total for out in outs).backward()
    assert all(model.executor_report().captured[i] for i in range(M))
    assert_close(grads(model), grads(twin))


class Average(nn.Module):
    """Keeps statistics in a parameter without a gradient, as some codebooks do."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(192), requires_grad=False)
        self.head = nn.Linear(192, C)

    def forward(self, x):
        x = x.flatten(1)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
        return self.head(x - self.mean)


class Decaying(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


@pytest.mark.parametrize("expert", [Average, lambda: nn.Sequential(nn.Flatten(), Decaying(192, C))])
def test_what_a_forward_writes_to_parameters_happens_once_a_step(pair, expert):
    model, twin = pair(expert)
    compare_steps(model, twin, 2 * MIN_SEEN)
    assert model.executor_report().hits > 0


def test_parameters_that_are_replaced_on_their_memory_get_the_gradients(pair):
    model, twin = pair(row_wise_expert)
    compare_steps(model, twin, MIN_SEEN + 1)
    for each in (model, twin):
        each.load_state_dict(each.state_dict(), assign=True)
    compare_steps(model, twin, MIN_SEEN + 1)


def test_an_expert_that_draws_keeps_the_stream_when_it_changes(pair):
    model, _ = pair(conv_expert)
    for expert in model.experts[1:]:
        expert[3].p = 0.0
    x, y = doubles()
    settled(model, x, y, MIN_SEEN + 1)
    model.experts[0][0].bias.requires_grad_(False)
    # The others are replayed all along, and it is again once it has been seen as often.
    with replays(model, (M - 1) * MIN_SEEN + 1):
        settled(model, x, y)


class DrawsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + 0 * torch.rand(()))


class Secretive(nn.Sequential):
    """Draws random numbers where only a capture sees it."""

    def forward(self, x):
        return DrawsBackward.apply(super().forward(x))


def test_an_expert_that_a_capture_shows_to_draw_is_captured_on_the_common_stream_alone(pair):
    model, _ = pair(lambda: Secretive(*row_wise_expert()))
    x, y = doubles()
    for counts in [[12, 4, 4, 4], *[[6] * M] * (MIN_SEEN - 1)]:
        backward(model, x, y, fixed_routing(model, counts=counts))
    log = model.executor._backend.log
    log.clear()
    backward(model, x, y, fixed_routing(model))
    assert model.executor_report().captured == {}
    log.clear()
    settled(model, x, y)
    assert set(log) == {0}
    assert set(model.executor_report().captured) == set(range(M))


def test_a_hub_that_shrinks_keeps_nothing_of_its_last_expert(pair):
    model, _ = pair(row_wise_expert)
    x, y = doubles()
    settled(model, x, y)
    assert {use.index for use in model.executor._store.records} == set(range(M))
    scores = torch.zeros(24, M - 1)
    source = model._row_source(x, hp.functional.noisy_topk(scores, scores, 1))
    model.executor(model.experts[: M - 1], source, 2)
    assert {use.index for use in model.executor._store.records} == set(range(M - 1))


def test_graphs_of_one_device_are_not_used_on_another(pair):
    model, twin = pair(row_wise_expert)
    compare_steps(model, twin, MIN_SEEN + 1)
    executor = model.executor
    first, executor._device = executor._backend, torch.device("meta")  # it was there before
    compare_steps(model, twin, 1)
    assert executor._backend is not first
    assert model.executor_report().captured == {}
