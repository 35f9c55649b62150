"""A trained generator and aggregator for other experts: some of the old ones, and one more.

Everything that was learned of the experts that stay is kept. Parameters that change their shape are
new objects, so an optimizer must be made again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .aggregator import LinearAggregator, MLPAggregator, SumAggregator
from .feature_generator import FeatureGenerator
from .generator import PathwayGenerator


def check_resizable(generator: nn.Module, aggregator: nn.Module) -> None:
    """Raises ValueError for kinds of modules that cannot be given another number of experts."""
    for name, module, kinds in (
        ("generator", generator, (PathwayGenerator, FeatureGenerator)),
        ("aggregator", aggregator, (LinearAggregator, MLPAggregator, SumAggregator)),
    ):
        if not isinstance(module, kinds):
            raise ValueError(
                f"{name}: experts can be added and removed with a "
                f"{' or '.join(kind.__name__ for kind in kinds)}, not with a "
                f"{type(module).__name__}; build a new HubPathway"
            )


@torch.no_grad()
def resize_generator(
    generator: PathwayGenerator | FeatureGenerator, kept: Sequence[int], score: float | None = None
) -> None:
    """Keeps the heads of the experts ``kept``. With a score there is one more expert: its scores
    are the mean of all others', its clean score that much higher."""
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
    aggregator: LinearAggregator | MLPAggregator | SumAggregator,
    kept: Sequence[int],
    one_more: bool,
) -> None:
    """Keeps the blocks of the experts ``kept``. With one more, its output is added to the weighted
    sum as it is; a trained correction to that sum knows nothing of it yet."""
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


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    """A parameter of another shape, as trainable as the old one."""
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))
