"""Gradients of captured experts: where they come from, where they go, and in which state."""

from collections import Counter

import torch
from support.graphs import (
    FakeBackend,
    assert_as_sequential,
    backward,
    fixed_routing,
    replays,
    row_wise_expert,
    settled,
)
from support.models import M, batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN
from hubpath_fast.executors.graphs.capture import CapturedModule, Pool


def test_micro_batches_add_up(trained):
    model, x, y = trained()

    def two_backwards(model):
        for _ in range(2):
            backward(model, x, y, fixed_routing(model))

    with replays(model, 2 * M):
        assert_as_sequential(model, two_backwards)


def test_an_expert_that_uses_a_foreign_tensor_is_not_captured_since_that_would_get_no_gradient(
    trained,
):
    outside = torch.ones(3, requires_grad=True)

    class Foreign(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * outside.sum()

    model, x, y = trained(lambda: Foreign(*row_wise_expert()), 4 * MIN_SEEN)
    report = model.executor_report()
    assert report.captured == {}
    assert "uses a tensor [3] that requires a gradient" in report.eager[0]
    outside.grad = None
    backward(model, x, y, fixed_routing(model))
    assert outside.grad.isfinite().all()


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
    captured = CapturedModule(expert, x[:6], x[:6].clone(), Pool(None), FakeBackend(None))
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


def test_a_gradient_is_copied_once(trained):
    model, x, y = trained()
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


def test_a_backward_is_captured_outside_of_autocast_and_a_forward_without_its_cache(make):
    cached = []

    class Expert(nn.Sequential):
        def forward(self, x):
            cached.append(torch.is_autocast_cache_enabled())
            return Recording.apply(super().forward(x))

    model, (x, y) = make(lambda: Expert(*row_wise_expert())), batch()
    AUTOCAST_SEEN.clear()
    for _ in range(1 + MIN_SEEN):  # after the first, rows are gathered in autocast's precision
        with torch.autocast("cpu", torch.bfloat16):
            loss = hp.HubPathwayLoss()(model(x, routing=fixed_routing(model)), y).total
        loss.backward()
    assert model.executor_report().captured == {i: [6] for i in range(M)}
    # Three eager backwards for each expert, then one to warm up, one captured and one replayed.
    assert AUTOCAST_SEEN == [False] * M * 6
    assert cached.count(False) == 2 * M  # replays must cast the updated weights


def test_frozen_experts_have_no_captured_backward(make):
    model, (x, y) = make(), batch()
    model.experts.requires_grad_(False)
    settled(model, x, y, MIN_SEEN + 1)
    assert model.executor_report().hits == 2 * M
    assert model.executor._backend.captures == M
    assert all(p.grad is None for p in model.experts.parameters())
