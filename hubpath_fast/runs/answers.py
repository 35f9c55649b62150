"""What a hub says of a split, kept once: any choice of experts is then scored without a model.

One pass stores the generator's scores and what every expert says of every image. How a hub does
with fewer experts, another K or other weights is a softmax and one call of the aggregator on these.
Letters: n images, M experts, C outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import functional as HF
from ..data.cache import free_memory
from ..devices import autocast, eval_mode, to_device
from ..model import (
    FixedRoutes,
    HubPathway,
    LinearAggregator,
    NewcomerAggregator,
    SumAggregator,
)

MEMORY_FRACTION = 0.5  # of the free memory, that answers may take
CHUNK = 1024  # images whose concatenation [CHUNK, M*C, ...] is built at a time


@dataclass(frozen=True, eq=False)
class HubAnswers:
    """Of n images, on the host.

    clean: [n, M], the generator's scores without noise. outputs: [n, M, C, ...], of every expert,
    at least float32. targets: [n, ...]. k, renormalize: as of the model. aggregator: a copy of the
    model's, in evaluation mode.
    """

    clean: Tensor
    outputs: Tensor
    targets: Tensor
    k: int
    renormalize: bool
    aggregator: nn.Module

    @property
    def num_experts(self) -> int:
        return self.clean.shape[1]

    def subset(self, images: Tensor) -> HubAnswers:
        """Of some of the images: int64 or bool indices."""
        kept = self.clean[images], self.outputs[images], self.targets[images]
        return HubAnswers(*kept, self.k, self.renormalize, self.aggregator)

    def weights(self, kept: Sequence[int] | None = None, k: int | None = None) -> Tensor:
        """[n, M], 0 where an expert is not asked: of the K likeliest their share of a softmax over
        the experts ``kept`` (None: all), as a hub of these alone has it."""
        chosen = torch.arange(self.num_experts) if kept is None else torch.as_tensor(kept)
        clean = self.clean[:, chosen]
        routing = HF.noisy_topk(
            clean, torch.zeros_like(clean), self.k if k is None else k, None, self.renormalize
        )
        dense = routing.weights.new_zeros(len(clean), self.num_experts)
        return dense.scatter_(1, chosen[routing.experts], routing.weights)

    @torch.no_grad()
    def combine(self, weights: Tensor) -> Tensor:
        """The model's outputs [n, C, ...] for weights [n, M], 0 where an expert is not asked.

        A block of the aggregator whose expert has weight 0 adds nothing, so a hub without that
        expert has the same outputs, up to the order of sums."""
        parts = []
        for w, outputs in zip(weights.split(CHUNK), self.outputs.split(CHUNK), strict=True):
            w = w.to(outputs.dtype).view(*w.shape, *[1] * (outputs.dim() - 2))
            weighted = torch.where(w == 0, 0, w * outputs)  # whatever an expert says unasked
            parts.append(self.aggregator(weighted.flatten(1, 2)))
        return torch.cat(parts)

    def predict(self, kept: Sequence[int] | None = None, k: int | None = None) -> Tensor:
        """The model's outputs [n, C, ...] with the experts ``kept`` alone, K of them active."""
        return self.combine(self.weights(kept, k))


@torch.no_grad()
def ask(
    model: HubPathway,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device,
    amp: str = "none",
    room: Callable[[int], None] = lambda _: None,
) -> HubAnswers:
    """Asks every expert about every image, in evaluation mode.

    Args:
        model: on ``device``.
        batches: (images, targets).
        amp: "none" or "bf16", of generator and experts; what is kept is combined in float32.
        room: is told how many bytes a batch of answers takes for an image, before they are kept.

    Raises:
        ValueError: a model with ``FixedRoutes``, whose scores say nothing; not a single image.
    """
    if isinstance(model.generator, FixedRoutes):
        raise ValueError(
            "model: expected a generator that scores each image, got fixed routes, the same for all"
        )
    clean, outputs, targets = [], [], []
    with eval_mode(model):
        for images, target in batches:
            images = to_device(images, torch.device(device))
            with autocast(torch.device(device), amp):
                scores, _ = model.scores(images)
                answers = model.ask_all(images)
            if not outputs:
                room(4 * answers[0].numel())
            clean.append(_kept(scores))
            outputs.append(_kept(answers))
            targets.append(target.cpu())
    if not clean:
        raise ValueError("batches: expected at least one image, got none")
    aggregator = copy.deepcopy(model.aggregator).cpu().eval()
    found = torch.cat(clean), torch.cat(outputs), torch.cat(targets)
    return HubAnswers(*found, model.k, model.renormalize, aggregator)


def terms(aggregator: nn.Module, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """An aggregator that is a sum over the experts: (what it adds for each of them if its weight is
    1 [n, M, C, ...], what it adds in any case [C, 1, ...]); None: it is none.

    outputs: [n, M, C, ...], of the experts.
    """
    trailing = [1] * (outputs.dim() - 3)
    if isinstance(aggregator, SumAggregator):
        return outputs, outputs.new_zeros(outputs.shape[2], *trailing)
    if isinstance(aggregator, LinearAggregator):
        blocks = aggregator.weight.detach().unflatten(1, outputs.shape[1:3])
        bias = aggregator.bias.detach().view(-1, *trailing)
        return torch.einsum("cmd,nmd...->nmc...", blocks, outputs), bias
    if isinstance(aggregator, NewcomerAggregator):
        old = aggregator.num_old
        inner = terms(aggregator.aggregator, outputs[:, :old])
        return None if inner is None else (torch.cat([inner[0], outputs[:, old:]], 1), inner[1])
    return None


def check_memory(bytes_each: int, images: int, remedy: str = "hold out fewer") -> None:
    """Raises ValueError where the answers to so many images would not leave memory enough."""
    free, held = free_memory(), bytes_each * images
    if free is not None and held > MEMORY_FRACTION * free:
        raise ValueError(
            f"data: the answers to {images} images take {held / 2**30:.2f} GiB, more than half of "
            f"the {free / 2**30:.2f} GiB of memory that are free; {remedy}"
        )


def _kept(values: Tensor) -> Tensor:
    """On the host, of at least float32."""
    return values.to("cpu", torch.promote_types(values.dtype, torch.float32))
