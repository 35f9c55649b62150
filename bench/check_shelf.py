"""Checks of a shelf's hub on a device: heads of all experts in one launch, and training steps.

A step on the device is compared with the same step in float64 on the host, where the executor goes
from expert to expert: with features on the device, and with those that do not fit there, of which
each step's rows are copied; with the optimizer's updates, and with the executor's own. As in
``check_kernels``, each check is a function of a device and a backend.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import hubpath_fast as hp
from hubpath_fast.shelf.executor import GroupedHeads
from hubpath_fast.shelf.parts import FeatureHead, ShelfFeatureGenerator
from hubpath_fast.shelf.placing import place

from .children import Write
from .operations import relative_error
from .verdicts import write_error

# Sums of some hundred products in float32, in another order than the truth's; AdamW divides by the
# root of a mean of squares, so that a small gradient's error is of the size of a step.
OUTPUTS, UPDATES = 1e-5, 1e-3
STEPS, RATE = 6, 1e-2


class Shelf(NamedTuple):
    """models: D of each, in turn. images: on the shelf. n: samples of a step."""

    experts: int
    models: tuple[int, ...]
    images: int
    n: int
    k: int
    classes: int


# Ragged, odd widths; then as many experts as a shelf may have, and outputs that fill several tiles.
SHELVES = {
    "ragged": Shelf(7, (64, 37, 130), 50, 33, 2, 10),
    "large": Shelf(256, (768, 512, 384, 1280), 400, 256, 2, 100),
}


def hub_of(shelf: Shelf) -> hp.HubPathway:
    """Of the same weights and features each time; features are float16, as on a shelf."""
    torch.manual_seed(0)

    def features(width: int) -> Tensor:
        return torch.randn(shelf.images, width).half()

    widths = [shelf.models[i % len(shelf.models)] for i in range(shelf.experts)]
    experts = [FeatureHead(features(width), shelf.classes) for width in widths]
    generator = ShelfFeatureGenerator(shelf.experts, features(shelf.models[0]))
    torch.nn.init.normal_(generator.clean.weight, std=0.3)
    return hp.HubPathway(
        experts, generator, hp.SumAggregator(shelf.experts, shelf.classes), shelf.k,
        num_outputs=shelf.classes, executor=GroupedHeads("torch"),
    )  # fmt: skip


def batch(shelf: Shelf, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers of images, targets, noise)."""
    random = torch.Generator().manual_seed(step)
    numbers = torch.randint(shelf.images, (shelf.n,), generator=random).double()
    targets = torch.randint(shelf.classes, (shelf.n,), generator=random)
    return numbers, targets, torch.randn(shelf.n, shelf.experts, generator=random).double()


def optimizer_of(model: hp.HubPathway) -> torch.optim.Optimizer:
    """Of the heads: their weights decay, their biases do not."""
    heads = [p for expert in model.experts for p in (expert.layer.weight, expert.layer.bias)]
    groups = [{"params": heads[::2], "weight_decay": 0.05}, {"params": heads[1::2]}]
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0, foreach=True)


def updating(
    model: hp.HubPathway, optimizer: torch.optim.Optimizer, own: bool
) -> contextlib.AbstractContextManager:
    """Within, the executor may make the updates, if it is its own to make them."""
    if not own:
        return contextlib.nullcontext()
    return model.executor.updating(model.experts, optimizer)


def trained(model: hp.HubPathway, shelf: Shelf, device: str, own: bool) -> Iterator[list[Tensor]]:
    """Step by step: prediction, outputs, and all heads' parameters after the update. own: whether
    the executor may make the updates."""
    optimizer, loss = optimizer_of(model), hp.HubPathwayLoss()
    with updating(model, optimizer, own):
        for step in range(STEPS):
            x, y, noise = (part.to(device) for part in batch(shelf, step))
            if model.experts[0].layer.weight.dtype != torch.float64:
                noise = noise.float()
            optimizer.zero_grad()
            out = model.train()(x, noise)
            loss(out, y).total.backward()
            optimizer.step()
            yield [out.prediction.detach(), out.expert_outputs.detach(), _parameters(model)]


def _parameters(model: hp.HubPathway) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.experts.parameters()])


NAMES = "prediction", "outputs", "parameters"


def steps(write: Write, device: str, backend: str, shelves: dict[str, Shelf] | None = None) -> None:
    """Training steps of each shelf, in each way, against the host's in float64."""
    for title, shelf in (shelves or SHELVES).items():
        plain = hub_of(shelf)
        expected = list(trained(copy.deepcopy(plain).double(), shelf, "cpu", False))
        for where, free in (("device", None), ("host", 0)):
            for own in (False, True):
                whose = "the executor's" if own else "AdamW's"
                text = f"shelf {title}, features on the {where}, {whose} updates"
                way = partial(hub_on, plain, device, backend, free)
                judge = partial(_difference, way, shelf, device, own, expected)
                write_error(write, text, judge)


def hub_on(plain: hp.HubPathway, device: str, backend: str, free: int | None) -> hp.HubPathway:
    """A copy of it on the device. free: see ``place``."""
    model = copy.deepcopy(plain)
    model.executor = GroupedHeads(backend)
    if torch.device(device).type == "cuda":
        place(model, device, free)
    return model.to(device)


def _difference(
    make: Callable[[], hp.HubPathway],
    shelf: Shelf,
    device: str,
    own: bool,
    expected: list[list[Tensor]],
) -> tuple[str | None, float]:
    model = make()
    worst, start = 0.0, _parameters(model).cpu()
    for step, (found, right) in enumerate(
        zip(trained(model, shelf, device, own), expected, strict=True)
    ):
        for name, ours, wanted in zip(NAMES, found, right, strict=True):
            if ours.shape != wanted.shape:
                return f"step {step}: {name}: {list(ours.shape)}, not {list(wanted.shape)}", worst
            bound = OUTPUTS if step == 0 and name != "parameters" else UPDATES
            error = relative_error(ours.cpu(), wanted.double())
            worst = max(worst, error)
            if not error <= bound:
                return f"step {step}: {name} are off by {error:.1e}, above {bound:.0e}", worst
    if torch.equal(start, _parameters(model).cpu()):
        return "no head has moved: nothing was checked", worst
    return None, worst
