"""What an image costs at inference, of a Hub-Pathway and of what it is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..hub.costs import router_share
from ..model import HubPathway, always_on
from .votes import Ensemble

BATCH, REPEATS = 64, 5  # images at a time, and how often they are timed


@torch.no_grad()
def inference_costs(model: nn.Module, images: Tensor) -> dict[str, float | None]:
    """What an image costs at inference, in batches of up to 64: expert forwards and GFLOPs (a
    multiplication and an addition are two), counted, and milliseconds, the median of five; of a
    Hub-Pathway also ``router_share``, the FLOPs of its router over those of K mean experts.

    A network that is no Hub-Pathway counts as one expert, an ensemble as its members; neither has a
    share of a router (None).
    """
    model.eval()
    images = images[:BATCH].to(next(model.parameters()).device)
    rows = 0

    def count(_module, inputs, _output) -> None:
        nonlocal rows
        rows += len(inputs[0])

    experts = [*model.members] if isinstance(model, Ensemble) else [model]
    if isinstance(model, HubPathway):
        experts = [*model.experts]
        if (router := always_on(model.generator)) is not None:
            experts.append(router)  # it runs an expert on every image
    hooks = [expert.register_forward_hook(count) for expert in experts]
    with FlopCounterMode(display=False) as counter:
        model(images)
    for hook in hooks:
        hook.remove()
    seconds = median_seconds(lambda: model(images), images.device)
    return {
        "forwards_per_sample": rows / len(images),
        "gflops_per_sample": counter.get_total_flops() / len(images) / 1e9,
        "milliseconds_per_sample": 1e3 * seconds / len(images),
        "router_share": router_share(model, images.shape[-1])
        if isinstance(model, HubPathway)
        else None,
    }


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """What a call takes, of some."""
    times = []
    for _ in range(1 + REPEATS):  # the first prepares what later ones reuse
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def wait(device: torch.device) -> None:
    """Until a CUDA device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
