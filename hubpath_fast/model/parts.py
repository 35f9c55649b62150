"""What a Hub-Pathway is made of, as it is given: what is refused, and what is read off it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..executors.groups import expert_name


def check_modules(
    experts: Sequence[nn.Module], generator: nn.Module, aggregator: nn.Module | None
) -> None:
    """Raises ValueError, with what would do, for a part that is no module."""
    named = [(f"experts[{i}]", expert) for i, expert in enumerate(experts)]
    named += [("generator", generator)]
    if aggregator is not None:
        named += [("aggregator", aggregator)]
    for name, part in named:
        if not isinstance(part, nn.Module):
            way = {
                "generator": "hp.PathwayGenerator(len(experts)), or one of your own",
                "aggregator": "hp.LinearAggregator, hp.SumAggregator or hp.MLPAggregator "
                "(num_experts, num_outputs), one of your own, or None",
            }.get(name, "hp.create_model makes a model of names")
            raise ValueError(f"{name}: expected an nn.Module, got {part!r}; {way}")


def infer_num_outputs(experts: Sequence[nn.Module]) -> int:
    """C, read off the experts' last layers; ValueError where they do not agree."""
    widths = []
    for expert in experts:
        layers = [m for m in expert.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        last = layers[-1] if layers else None
        name = "out_features" if isinstance(last, nn.Linear) else "out_channels"
        widths.append(getattr(last, name, None))
    if None in widths or len(set(widths)) != 1:
        found = ", ".join(f"{expert_name(experts, i)}: {width}" for i, width in enumerate(widths))
        raise ValueError(
            f"num_outputs: the experts' last layers do not agree on the outputs C ({found}); "
            "replace their heads for the task, or pass num_outputs="
        )
    return widths[0]


def are_channels_last(experts: nn.Module) -> bool:
    """Whether the experts' convolutions lie so in memory, by the first that tells.

    A 1 x 1 kernel is in both layouts at once, and says nothing."""
    kernels = (p for p in experts.parameters() if p.dim() == 4 and p.shape[-1] > 1)
    first = next(kernels, None)
    if first is None or first.is_contiguous():
        return False
    return first.is_contiguous(memory_format=torch.channels_last)
