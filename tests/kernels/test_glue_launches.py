"""How many launches each operation takes, and the glue of a training step, at K = 2.

What torch itself launches is listed beside Triton's kernels. The limits of what lies between the
generator, the experts and the prediction are five forward and four backward; of the whole glue, all
losses and their sum included, as ``bench.glue`` runs it, twelve.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.operations import (
    aggregated,
    aggregated_with_both,
    combined,
    combined_with_both,
    combined_with_loss,
    exploited,
    supervised,
)
from support.output_cases import SMALL, leaves, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import glue
from hubpath_fast import HubPathwayLoss, PathwayOutput, _backends, _checks, kernels
from hubpath_fast import functional as HF
from hubpath_fast.model import losses
from hubpath_fast.model.output import FusedExploit

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
            self.names.append(f"torch {name}")
        return func(*args, **(kwargs or {}))


def count(
    forward: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], launches: list[str]
) -> tuple[list[str], list[str]]:
    """Names of what forward and backward launch: Triton's kernels, then torch's operators."""
    with TorchLaunches() as own:
        results = forward()
    found = launches + own.names
    upstream = [torch.ones_like(result) for result in results]
    del launches[:]
    with TorchLaunches() as own:
        torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    return found, launches + own.names


@pytest.mark.parametrize(
    ("operation", "forward", "backward"),
    [
        (combined, ["_combine_forward"], ["_combine_backward"]),
        (aggregated, ["_products", "_sum_rows"], ["_backward_rows", "_backward_matrix"]),
        (exploited, ["_loss_forward", "torch sum"], ["_loss_backward"]),
        (combined_with_loss, ["_combine_forward", "_loss_forward", "torch sum"],
         ["_combine_backward"]),
        (supervised, ["_loss_forward", "_router_loss"], ["torch mul"]),
        # The router's loss: one launch more in either direction.
        (combined_with_both,
         ["_combine_forward", "_loss_forward", "_router_loss", "torch sum"],
         ["_combine_backward", "torch addcmul"]),
        (aggregated_with_both,
         ["_loss_forward", "_router_loss", "_products", "_sum_rows"],
         ["_backward_rows", "_backward_matrix", "torch addcmul"]),
    ],
)  # fmt: skip
def test_an_operation_launches_its_kernels_alone(operation, forward, backward, launches, device):
    i = make(SMALL, torch.float32, device)
    tensors = leaves(*i.sources)
    assert count(lambda: operation(*tensors, i), tensors, launches) == (forward, backward)


def step(
    c: int, device, x_needs_gradient: bool, router_temperature: float | None = None
) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
    """The glue of one step up to what the losses take, and its leaves."""
    x = torch.randn(N, 3, 4, 4, device=device, requires_grad=x_needs_gradient)
    eps, target = torch.randn(N, M, device=device), torch.randint(c, (N,), device=device)
    sizes = ((N, M), (N, M), (N * K, c), (c, M * c), (c,))
    clean, noise, outputs, matrix, bias = inner = [
        torch.randn(size, device=device, requires_grad=True) for size in sizes
    ]

    def forward():
        routing = HF.noisy_topk(clean, noise, K, eps, backend="triton")
        rows = HF.gather(x, routing, backend="triton")
        joined = HF.aggregate_with_exploit_loss(
            outputs, routing, matrix, bias, target, backend="triton",
            router_temperature=router_temperature,
        )  # fmt: skip
        return *joined, routing.mean, *([rows] if x_needs_gradient else [])

    return forward, [*inner, *([x] if x_needs_gradient else [])]


@pytest.fixture(autouse=True)
def targets_unseen(monkeypatch):
    """On a device no target is looked at before the launch; on the CPU that takes operators."""
    for module in (_checks, losses):
        monkeypatch.setattr(module, "check_range", lambda *_: None)


FORWARD = ["route_and_plan_kernel", "_gather_kernel", "_loss_forward", "_products", "_sum_rows"]
BACKWARD = ["_backward_matrix", "_backward_rows", "_route_backward_kernel"]


@pytest.mark.parametrize("c", [10, 100], ids=["C=10", "the paper's C"])
def test_a_step_on_images_takes_five_launches_and_three(launches, device, c):
    """Images need no gradient, so nothing goes back through the gather."""
    forward, backward = count(*step(c, device, x_needs_gradient=False), launches)
    assert forward == FORWARD
    assert sorted(backward) == BACKWARD


def test_a_gradient_for_the_inputs_is_the_fourth_backward_launch(launches, device):
    forward, backward = count(*step(10, device, x_needs_gradient=True), launches)
    assert forward == FORWARD
    assert sorted(backward) == sorted([*BACKWARD, "_gather_backward_kernel"])


def test_supervision_of_the_router_adds_a_launch_in_either_direction(launches, device):
    forward, backward = count(*step(10, device, False, router_temperature=0.5), launches)
    assert sorted(forward) == sorted([*FORWARD, "_router_loss"])
    assert sorted(backward) == sorted([*BACKWARD, "torch addcmul"])


def test_noise_drawn_inside_adds_only_its_seed(launches, device):
    clean = torch.randn(N, M, device=device)
    with TorchLaunches() as own:
        HF.noisy_topk(clean, clean, K, "draw", backend="triton")
    assert launches == ["route_and_plan_kernel"]
    assert own.names == ["torch randint"]


@pytest.mark.parametrize("size", [(48, 5, 2, 10), (48, 5, 2, 100)], ids=["C=10", "the paper's C"])
def test_the_whole_glue_of_a_step(size, launches, device):
    """torch joins the experts' outputs, and makes the gradient of the total."""
    run = glue.step(glue.make(*size, str(device)), "triton")
    with TorchLaunches() as own:
        run()
    forward, backward = launches[:6], launches[6:]
    assert forward == [*FORWARD, "_total_loss"]
    assert backward[0] == "_total_loss_backward"
    assert sorted(backward[1:]) == BACKWARD
    assert own.names == ["torch cat", "torch ones_like"]


def test_the_losses_of_a_model_launch_as_much(launches, device, monkeypatch):
    """What is left behind the model's own; a loss that is off is a number that is filled in."""
    routing = HF.noisy_topk(*torch.randn(2, N, M, device=device), K, backend="triton")
    prediction = torch.randn(N, 10, device=device, requires_grad=True)
    exploit, target = torch.rand((), device=device), torch.randint(10, (N,), device=device)
    out = PathwayOutput(prediction, torch.randn(N * K, 10, device=device), routing)
    out.fused_exploit = FusedExploit(exploit, target, 0.0)
    del launches[:]
    monkeypatch.setattr(_backends, "choose", lambda *_: kernels)  # as on a device
    with TorchLaunches() as own:
        HubPathwayLoss()(out, target).total.backward()
    assert launches == ["_total_loss", "_total_loss_backward"]
    assert own.names == ["torch new_zeros", "torch ones_like"]
