"""Images that between them ask every expert of a hub, for a package to be checked with.

They are drawn, since a package is made where no data need be: flat colours, gradients, stripes and
noise of all grains and contrasts. An image whose choice of experts hangs on the last bits of its
scores is left out where there are others: two programs that are both right may choose differently.

Shapes: N images, M experts, K active ones, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import FixedRoutes, HubPathway
from ..model.policy import dense_weights

DRAWN_AT_ONCE = 64
MOST_DRAWN = 2048
# What an expert says is seen in an answer only where its weight is not small.
ENOUGH = 0.1
CLEAR = 1e-5  # between two probabilities: a hundred times what float32 rounds them by
SEED = 0


@dataclass(frozen=True)
class Drawn:
    """images: uint8 [N, channels, S, S] on the host. scores: [N, M], the router's of them.
    unasked: the experts that none of all the images that were drawn asks with a weight of at least
    ``ENOUGH``."""

    images: Tensor
    scores: Tensor
    unasked: tuple[int, ...]


def draw_covering(model: HubPathway, size: int, count: int) -> Drawn:
    """``count`` images that ask as many of the experts as can be found; the model is in evaluation
    mode. Always the same ones of one model."""
    random = torch.Generator().manual_seed(SEED)
    channels = model.input_mean.shape[1]
    wanted = reachable(model)
    # Fixed routes are what they are, and every image asks them.
    asked = set(wanted) if isinstance(model.generator, FixedRoutes) else set()
    first, spare, unclear = [], [], []  # those that add an expert, and the others
    for _ in range(MOST_DRAWN // DRAWN_AT_ONCE):
        images = draw(DRAWN_AT_ONCE, channels, size, random)
        found, asks = look(model, images)
        clear = clear_choice(model, found)
        for image, own, of, fine in zip(images, found, asks, clear, strict=True):
            new = set(of.nonzero().flatten().tolist()) - asked if fine else set()
            kind = first if new else spare if fine else unclear
            kind.append((image, own))
            asked |= new
        if wanted <= asked and len(first) + len(spare) >= count:
            break
    kept = [*first, *spare, *unclear][:count]
    images, found = (torch.stack(parts) for parts in zip(*kept, strict=True))
    return Drawn(images, found, tuple(sorted(wanted - asked)))


def reachable(model: HubPathway) -> set[int]:
    """The experts that some image may ask."""
    if isinstance(model.generator, FixedRoutes):
        x = torch.zeros(1, 1, device=model.input_mean.device)
        return set(model.route(x).experts.flatten().tolist())
    return set(range(len(model.experts)))


def draw(count: int, channels: int, size: int, random: torch.Generator) -> Tensor:
    """uint8 [count, channels, size, size]: in turn a flat colour, a gradient, stripes, noise of a
    random grain; each of a random contrast."""
    x = torch.linspace(-1, 1, size)
    across, down = x.expand(size, size), x[:, None].expand(size, size)
    images = []
    for number in range(count):
        colour, other = torch.rand(2, channels, 1, 1, generator=random)
        angle, frequency = torch.rand(2, generator=random).tolist()
        along = across * torch.tensor(3.14 * angle).cos() + down * torch.tensor(3.14 * angle).sin()
        kind = number % 4
        if kind == 0:
            share = torch.zeros(size, size)
        elif kind == 1:
            share = (along + 1.5) / 3
        elif kind == 2:
            share = (torch.sin(along * (2 + 40 * frequency)) > 0).float()
        else:
            grain = max(1, int(size ** torch.rand(1, generator=random).item()))
            noise = torch.rand(1, channels, grain, grain, generator=random)
            share = F.interpolate(noise, (size, size))[0]
        images.append((colour + (other - colour) * share).clamp(0, 1).expand(channels, size, size))
    return (torch.stack(images) * 255).round().to(torch.uint8)


@torch.no_grad()
def look(model: HubPathway, images: Tensor) -> tuple[Tensor, Tensor]:
    """(the router's scores [N, M], whether an expert is asked with a weight of at least ``ENOUGH``,
    bool [N, M]) of images, on the host."""
    device, dtype = model.input_mean.device, model.input_mean.dtype
    found, asks = [], []
    for part in images.split(16):  # a router that looks at an expert's features has it run
        x = part.to(device)
        found.append(model.generator(x.to(dtype) / 255)[0])
        asks.append(dense_weights(model.route(x)) >= ENOUGH)
    return torch.cat(found).float().cpu(), torch.cat(asks).cpu()


def penalized(model: HubPathway, found: Tensor) -> Tensor:
    """Scores [N, M] as they are compared: less the penalty of the model's policy."""
    policy = model.policy
    if policy is None or policy.penalty is None:
        return found
    return found - found.new_tensor(policy.penalty)


def clear_choice(model: HubPathway, found: Tensor) -> list[bool]:
    """[N], of scores [N, M]: whether the K largest probabilities differ clearly from each other and
    from the next, or are equal to the bit, which is decided by the experts' order; and whether a
    policy's share of the weight is clearly reached or not."""
    policy = model.policy
    p = penalized(model, found).softmax(dim=1).sort(dim=1, descending=True).values
    gaps = (p[:, :-1] - p[:, 1:])[:, : model.k]
    clear = ((gaps == 0) | (gaps > CLEAR)).all(dim=1)
    if policy is not None and policy.top_mass is not None:
        away = (p.cumsum(dim=1)[:, : model.k - 1] - policy.top_mass).abs()
        clear &= (away > CLEAR).all(dim=1)
    return clear.tolist()
