"""A trained generator and aggregator for other experts: some of the old ones, and one more.

Everything that was learned of the experts that stay is kept. Parameters that change their shape are
new objects, so an optimizer must be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .aggregator import LinearAggregator, MLPAggregator, SumAggregator
from .feature_generator import FeatureScores
from .generator import PathwayGenerator
from .newcomers import NewcomerAggregator, NewcomerGenerator

if TYPE_CHECKING:
    from .pathway import HubPathway


def check_resizable(
    generator: nn.Module, aggregator: nn.Module, kept: Sequence[int] | None = None
) -> None:
    """Raises ValueError for kinds of modules that cannot be given another number of experts. kept:
    those that stay, where none is added."""
    if isinstance(generator, NewcomerGenerator) and isinstance(aggregator, NewcomerAggregator):
        if kept is None:
            raise ValueError(
                "generator: a hub that newcomers have joined takes others in the same way; use "
                "add_newcomer"
            )
        left = sum(i < generator.num_old for i in kept)
        if left < generator.k:
            raise ValueError(
                f"index: {left} experts would be left of the hub that newcomers have joined, which "
                f"asks k={generator.k}; remove newcomers first"
            )
        generator, aggregator = generator.generator, aggregator.aggregator
    for name, module, kinds, words in (
        (
            "generator",
            generator,
            (PathwayGenerator, FeatureScores),
            "PathwayGenerator or FeatureGenerator",
        ),
        (
            "aggregator",
            aggregator,
            (LinearAggregator, MLPAggregator, SumAggregator),
            "LinearAggregator or MLPAggregator or SumAggregator",
        ),
    ):
        if not isinstance(module, kinds):
            raise ValueError(
                f"{name}: experts can be added and removed with a {words}, not with a "
                f"{type(module).__name__}; build a new HubPathway"
            )


def check_not_frozen(model: HubPathway) -> None:
    """Raises ValueError for a model that is ready for predictions alone: what is new would be
    neither folded nor of its experts' dtype."""
    if model.frozen is not None:
        raise ValueError(
            "experts: a model that was frozen for inference keeps its experts; change "
            "them before freeze_for_inference"
        )


@torch.no_grad()
def resize_generator(
    generator: PathwayGenerator | FeatureScores | NewcomerGenerator,
    kept: Sequence[int],
    score: float | None = None,
) -> None:
    """Keeps the heads of the experts ``kept``. With a score there is one more expert: its scores
    are the mean of all others', its clean score that much higher."""
    if isinstance(generator, NewcomerGenerator):
        old, new = _apart(kept, generator.num_old)
        resize_generator(generator.generator, old)
        for name in ("clean", "noise"):
            heads = getattr(generator, name)
            setattr(generator, name, nn.ModuleList(heads[i] for i in new))
        return
    for head in (generator.clean, generator.noise):
        for name in ("weight", "bias"):
            old = getattr(head, name)
            more = [] if score is None else [old.mean(dim=0, keepdim=True)]
            _replace(head, name, torch.cat([old[kept], *more]))
        head.out_features = generator.num_experts = len(head.bias)
    if score is not None:
        generator.clean.bias[-1] += score


@torch.no_grad()
def resize_aggregator(
    aggregator: LinearAggregator | MLPAggregator | SumAggregator | NewcomerAggregator,
    kept: Sequence[int],
    one_more: bool,
) -> None:
    """Keeps the blocks of the experts ``kept``. With one more, its output is added to the weighted
    sum as it is; a trained correction to that sum knows nothing of it yet."""
    if isinstance(aggregator, NewcomerAggregator):
        old, new = _apart(kept, aggregator.num_old)
        resize_aggregator(aggregator.aggregator, old, one_more=False)
        aggregator.num_old, aggregator.count = len(old), len(new)
        return
    if isinstance(aggregator, SumAggregator):
        aggregator.num_experts = len(kept) + one_more
        return
    linear = aggregator if isinstance(aggregator, LinearAggregator) else aggregator.linear
    outputs = linear.num_outputs
    layers = [(linear, torch.eye(outputs).to(linear.weight))]
    if isinstance(aggregator, MLPAggregator):
        hidden = aggregator.expand
        layers.append((hidden, hidden.weight.new_zeros(hidden.out_features, outputs)))
    for layer, new in layers:
        blocks = layer.weight.unflatten(1, (-1, outputs)).unbind(1)
        chosen = [*(blocks[i] for i in kept), *[new] * one_more]
        _replace(layer, "weight", torch.cat(chosen, dim=1))
        if isinstance(layer, nn.Linear):
            layer.in_features = layer.weight.shape[1]
    linear.num_experts = len(kept) + one_more


def _apart(kept: Sequence[int], num_old: int) -> tuple[list[int], list[int]]:
    """(experts of the hub as it was, newcomers, counted from the first of them)."""
    return [i for i in kept if i < num_old], [i - num_old for i in kept if i >= num_old]


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    """A parameter of another shape, as trainable as the old one."""
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))
