"""Adding an expert to a trained Hub-Pathway, and taking one away.

The generator's heads, the aggregator and the normalisation grow or shrink by one expert, in place;
everything else that was learned is kept. Parameters that change their shape are new objects, so an
optimizer made before must be made anew. Nothing is changed if anything is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .aggregator import LinearAggregator, MLPAggregator
from .generator import PathwayGenerator

if TYPE_CHECKING:
    from .pathway import HubPathway

Change = Callable[[], None]


def add_expert(
    model: HubPathway,
    module: nn.Module,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    score: float = 0.0,
) -> None:
    """Appends ``module`` to the experts, as number M.

    The aggregator adds the new expert's weighted output to the prediction, as a fresh one does. Its
    scores are the mean of the other experts' plus ``score``: at 0 it is chosen as often as an
    average expert, at -30 never before it has learned (the prediction then stays as it was). Its
    noise scale is the mean of the others'.

    Args:
        model: with a ``PathwayGenerator`` and a ``LinearAggregator`` or an ``MLPAggregator``.
        module: x [n, ...] -> [n, C, ...], C as the other experts have it; moved to their device.
        mean, std: [channels] of its images, in units of images in [0, 1]; needed where the model
            has a normalisation, and only there.
        score: added to the new expert's clean score.

    Raises:
        ValueError: anything of the above that is otherwise.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: expected an nn.Module, got {type(module).__name__}")
    rows = _new_normalization(model, mean, std)
    count = len(model.experts)
    changes = [
        *_generator_changes(model.generator, _with_mean_row, score),
        *_aggregator_changes(model.aggregator, count, lambda blocks, new: [*blocks, new]),
    ]
    for change in changes:
        change()
    _set_num_experts(model, count + 1)
    if rows is not None:
        model.input_mean = torch.cat([model.input_mean, rows[0]])
        model.input_std = torch.cat([model.input_std, rows[1]])
    anchor = model.generator.clean.weight
    model.experts.append(module.to(anchor.device).train(model.training))


def remove_expert(model: HubPathway, index: int) -> nn.Module:
    """Takes expert ``index`` (0..M-1, or negative from the end) away and returns it.

    Predictions stay as they were for every input that gave this expert no weight; where it had
    some, the others' weights grow, since they are a softmax over the experts that remain.

    Raises:
        ValueError: no such expert; fewer experts than K would remain (lower ``model.k`` first); a
            generator or an aggregator of another kind than ``add_expert`` takes.
    """
    count = len(model.experts)
    if not isinstance(index, int) or not -count <= index < count:
        raise ValueError(f"index: expected an expert, 0..{count - 1}, got {index!r}")
    if count - 1 < max(model.k, 1):
        raise ValueError(
            f"index: without expert {index} there are {count - 1} experts for k={model.k} active "
            "ones; lower model.k first"
            if count > 1
            else "index: the only expert cannot be removed"
        )
    index %= count
    kept = [i for i in range(count) if i != index]
    changes = [
        *_generator_changes(model.generator, lambda old: old[kept], None),
        *_aggregator_changes(model.aggregator, count, lambda blocks, _: [blocks[i] for i in kept]),
    ]
    for change in changes:
        change()
    _set_num_experts(model, count - 1)
    if model.input_mean is not None:
        model.input_mean, model.input_std = model.input_mean[kept], model.input_std[kept]
    module = model.experts[index]
    del model.experts[index]
    return module


def _generator_changes(
    generator: nn.Module, rows: Callable[[Tensor], Tensor], score: float | None
) -> list[Change]:
    """rows: a head's weight or bias [M, ...] -> the same for the new number of experts."""
    if not isinstance(generator, PathwayGenerator):
        raise ValueError(
            f"generator: experts can be added and removed with a PathwayGenerator, not with a "
            f"{type(generator).__name__}; build a new HubPathway"
        )

    def change() -> None:
        for head in (generator.clean, generator.noise):
            _replace(head, "weight", rows(head.weight))
            _replace(head, "bias", rows(head.bias))
            head.out_features = len(head.bias)
        if score is not None:
            with torch.no_grad():
                generator.clean.bias[-1] += score

    return [change]


def _with_mean_row(old: Tensor) -> Tensor:
    return torch.cat([old, old.mean(dim=0, keepdim=True)])


def _aggregator_changes(aggregator: nn.Module, count: int, blocks) -> list[Change]:
    """blocks: (the M blocks [out, C] of a matrix [out, M*C], a new one) -> those to keep."""
    if isinstance(aggregator, LinearAggregator):
        linear, layers = aggregator, []
    elif isinstance(aggregator, MLPAggregator):
        linear, layers = aggregator.linear, [aggregator.expand]
    else:
        raise ValueError(
            f"aggregator: experts can be added and removed with a LinearAggregator or an "
            f"MLPAggregator, not with a {type(aggregator).__name__}; build a new HubPathway"
        )
    outputs = linear.num_outputs

    def change() -> None:
        # The weighted sum takes the newcomer's output as it is; a trained correction to that sum
        # knows nothing of it yet.
        eye = torch.eye(outputs, dtype=linear.weight.dtype, device=linear.weight.device)
        parts = [(linear, eye)]
        parts += [(layer, layer.weight.new_zeros(len(layer.weight), outputs)) for layer in layers]
        for layer, new in parts:
            old = layer.weight.detach().unflatten(1, (count, outputs)).unbind(1)
            _replace(layer, "weight", torch.cat(blocks(list(old), new), dim=1))
        for layer in layers:
            layer.in_features = layer.weight.shape[1]

    return [change]


def _new_normalization(model: HubPathway, mean, std) -> tuple[Tensor, Tensor] | None:
    if (mean is None) != (std is None) or (mean is None) != (model.input_mean is None):
        has = "no" if model.input_mean is None else "a"
        raise ValueError(
            f"mean, std: the model has {has} normalisation of its experts' images, so "
            + ("leave both out" if model.input_mean is None else "give both for the new one")
        )
    if mean is None:
        return None
    channels = model.input_mean.shape[1]
    rows = []
    for name, value in (("mean", mean), ("std", std)):
        row = torch.as_tensor(value).to(model.input_mean)
        if list(row.shape) != [channels]:
            raise ValueError(f"{name}: expected [{channels}] values, got shape {list(row.shape)}")
        rows.append(row[None])
    if not bool((rows[1] > 0).all()):
        raise ValueError(f"std: expected values above 0, got {rows[1][0].tolist()}")
    return rows[0], rows[1]


def _set_num_experts(model: HubPathway, count: int) -> None:
    """The numbers that modules keep for their own messages; and an executor made anew, since one
    may keep things by an expert's number."""
    model._running = None
    for module in (model.generator, model.aggregator, getattr(model.aggregator, "linear", None)):
        if hasattr(module, "num_experts"):
            module.num_experts = count


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    """A parameter of another shape, as trainable as the old one."""
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))
