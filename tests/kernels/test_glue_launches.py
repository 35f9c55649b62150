"""How many launches the glue of a training step takes, through the public functions, at K = 2.

Counted under the interpreter, with what torch itself would launch listed beside Triton's kernels.
The limits are five forward and four backward. What is not the package's to fuse is not counted: the
task loss on the prediction, and the sum of M numbers that the exploration loss is.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hubpath_fast import functional as HF

N, M, K = 48, 5, 2
FREE = ("empty", "new_empty", "detach", "alias", "_unsafe_view")


class TorchLaunches(TorchDispatchMode):
    """Names of torch's own operators that compute something."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace != "hubpath_fast" and not (func.is_view or name.startswith(FREE)):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Step:
    """The glue of one step: ``forward`` up to what the losses take, ``backward`` from there."""

    def __init__(self, c: int, x_needs_gradient: bool):
        self.x = torch.randn(N, 3, 4, 4, requires_grad=x_needs_gradient)
        self.clean, self.noise = (torch.randn(N, M, requires_grad=True) for _ in range(2))
        self.eps, self.target = torch.randn(N, M), torch.randint(c, (N,))
        self.outputs = torch.randn(N * K, c, requires_grad=True)
        self.matrix = torch.randn(c, M * c, requires_grad=True)
        self.bias = torch.randn(c, requires_grad=True)

    def forward(self):
        routing = HF.noisy_topk(self.clean, self.noise, K, self.eps, backend="triton")
        rows = HF.gather(self.x, routing, backend="triton")
        prediction, loss = HF.aggregate_with_exploit_loss(
            self.outputs, routing, self.matrix, self.bias, self.target, backend="triton"
        )
        self.results = [prediction, loss, routing.mean]
        self.leaves = [self.clean, self.noise, self.outputs, self.matrix, self.bias]
        if self.x.requires_grad:
            self.results.append(rows)
            self.leaves.append(self.x)

    def prepare_backward(self):
        self.upstream = [torch.ones_like(result) for result in self.results]

    def backward(self):
        torch.autograd.grad(self.results, self.leaves, self.upstream)


@pytest.fixture(autouse=True)
def targets_unseen(monkeypatch):
    """On a device no target is looked at before the launch; on the CPU that takes operators."""
    monkeypatch.setattr(HF, "check_target", lambda *_: None)


def count(step: Step, launches: list[str]) -> tuple[list[str], list[str]]:
    """Names of what forward and backward launch: Triton's kernels, then torch's operators."""
    with TorchLaunches() as own:
        step.forward()
    forward = launches + [f"torch {name}" for name in own.names]
    step.prepare_backward()
    del launches[:]
    with TorchLaunches() as own:
        step.backward()
    return forward, launches + [f"torch {name}" for name in own.names]


FORWARD = [
    "route_and_plan_kernel",
    "_gather_kernel",
    "_loss_forward",
    "_products",
    "_sum_rows",
]


@pytest.mark.parametrize("c", [10, 100], ids=["C=10", "the paper's C"])
def test_a_step_on_images_takes_five_launches_and_three(launches, c):
    """Images need no gradient, so nothing goes back through the gather."""
    forward, backward = count(Step(c, x_needs_gradient=False), launches)
    assert forward == FORWARD
    assert sorted(backward) == ["_backward_matrix", "_backward_rows", "_route_backward_kernel"]


def test_a_gradient_for_the_inputs_is_the_fourth_backward_launch(launches):
    forward, backward = count(Step(10, x_needs_gradient=True), launches)
    assert forward == FORWARD
    assert len(backward) == 4
    assert "_gather_backward_kernel" in backward


def test_noise_drawn_inside_adds_only_its_seed(launches):
    clean = torch.randn(N, M)
    with TorchLaunches() as own:
        HF.noisy_topk(clean, clean, K, "draw", backend="triton")
    assert launches == ["route_and_plan_kernel"]
    assert own.names == ["randint"]
