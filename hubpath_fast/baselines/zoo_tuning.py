"""Zoo-Tuning and Zoo-Tuning-Lite (Shu et al., "Zoo-Tuning: Adaptive Transfer from A Zoo of Models",
ICML 2021): equal convolutional networks become one, whose kernels are mixed for each image.

- Convolutions: ``MixedConv2d`` (zoo_layers.py), with a gate each. Other layers can be mixed, too,
  where they are most of a network: see ``mixed_network``.
- BatchNorm: the mean of the experts' affine parameters; running statistics start over.
- Everything else in the body (linear layers, other norms): the experts' mean, as are buffers of
  floating point; of other buffers the first expert's are kept.
- Head: the first expert's, which is new for the task.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..hub import Expert, RunningStatistics
from ..hub.expert import network
from ..model.heads import head_names, head_parameters, lr_factor
from ..training import ParameterGroup, TrainerConfig
from .architectures import difference, tensors_of
from .single import SingleModel
from .zoo_layers import MixedConv2d, MixedLayer, MixedLinear

# For a type of layer: the experts' layers -> the mixed one.
MixedKinds = dict[type[nn.Module], Callable[[Sequence[Any]], nn.Module]]


class ZooTuning(SingleModel):
    """One network from M equal ones: images [N, 3, S, S] (uint8, or floats in [0, 1]) -> [N, C].

    It copies the experts and leaves them as they are.

    Args:
        experts: at least two, of the same architecture, normalisation and working size.
        lite: one set of coefficients for a whole batch in training, and their moving average at
            evaluation, so that the network is then a plain one; ``merged()`` returns that.
        linear: mix linear layers too, as 1 x 1 convolutions, instead of taking their mean.

    Raises:
        ValueError: experts that are too few or differ (in architecture, and the reason why; in
            normalisation or size, since there is one input; in what is frozen or in the factor of
            their rate, since their weights become one parameter); a convolution of an unknown kind,
            or none; experts that keep their running statistics, which start over here.
    """

    def __init__(self, experts: Sequence[Expert], lite: bool = False, linear: bool = False):
        _check(experts)
        kinds: MixedKinds = {_ConvNd: partial(MixedConv2d, lite=lite)}
        if linear:
            kinds[nn.Linear] = partial(MixedLinear, lite=lite)
        module, count = mixed_network([expert.module for expert in experts], kinds)
        if count == 0:
            raise ValueError(
                f"experts: there is no convolution in the body of {experts[0].name}, and "
                "Zoo-Tuning mixes those; take convolutional networks"
            )
        super().__init__(replace(experts[0], module=module))
        self.lite, self.size = lite, experts[0].size

    def merged(self) -> SingleModel:
        """The plain network that a lite one is at evaluation, its kernels computed once.

        It predicts what ``eval()`` does, at the cost of a single expert, and shares nothing with
        this one. ValueError if this one is not lite: its kernels differ from image to image.
        """
        if not self.lite:
            raise ValueError(
                "merged: the kernels of this ZooTuning differ from image to image; only one with "
                "lite=True is a plain network at evaluation"
            )
        module = copy.deepcopy(self.module)
        _replace_layers(
            module,
            lambda _, layer: layer.merged() if isinstance(layer, MixedLayer) else None,
        )
        mean, std = (tuple(t.flatten().tolist()) for t in (self.mean, self.std))
        plain = Expert("zoo-tuning-lite", module, mean, std, self.size)
        return SingleModel(plain).to(self.mean).eval()


def zoo_tuning_groups(model: ZooTuning, config: TrainerConfig) -> list[ParameterGroup]:
    """Groups for the trainer: the experts' kernels and averaged parameters at ``lr_expert`` (times
    the experts' factor, if they have one), the head at ``lr_head``, and the gates and alignments at
    ``lr_router``."""
    heads = head_parameters(model.module)
    layers = [layer for layer in model.modules() if isinstance(layer, MixedLayer)]
    router = [p for layer in layers for p in layer.router_parameters()]
    taken = {id(p) for p in (*heads, *router)}
    body = [p for p in model.parameters() if id(p) not in taken]
    lr_head = config.lr_expert if config.lr_head is None else config.lr_head
    groups = [
        ParameterGroup("experts", body, config.lr_expert * lr_factor(model)),
        ParameterGroup("heads", heads, lr_head),
        ParameterGroup("router", router, config.lr_router),
    ]
    return [group for group in groups if group.params]


def mixed_network(modules: Sequence[nn.Module], kinds: MixedKinds) -> tuple[nn.Module, int]:
    """A copy of the first module, wrappers and head and all, with the rest mixed or averaged.

    modules: of one architecture. kinds: for a type of layer what makes one mixed layer of the
    experts' layers of this type, or of one derived from it; the first that fits is taken.

    Returns the module, and how many of its layers are mixed.
    """
    module = copy.deepcopy(modules[0])
    target, sources = network(module), [network(source) for source in modules]
    heads = head_names(target)

    def mixed(name: str, layer: nn.Module) -> nn.Module | None:
        make = next((make for kind, make in kinds.items() if isinstance(layer, kind)), None)
        own = [f"{name}.{tensor}" for tensor in layer._parameters]
        if make is None or any(tensor in heads for tensor in own):
            return None
        return make([source.get_submodule(name) for source in sources])

    count = _replace_layers(target, mixed)
    tensors = [tensors_of(source) for source in sources]
    with torch.no_grad():
        for name, tensor in tensors_of(target).items():
            # A name that the experts lack is a mixed layer's own.
            if name in tensors[0] and name not in heads and tensor.is_floating_point():
                same = [source[name] for source in tensors]
                if any(not torch.equal(same[0], other) for other in same[1:]):
                    tensor.copy_(torch.stack(same).mean(dim=0))
    for layer in target.modules():
        if isinstance(layer, _BatchNorm):
            layer.reset_running_stats()
    return module, count


def _replace_layers(root: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> int:
    """Puts ``make(name, layer)`` in each layer's place unless it is None; returns how many.

    A layer that is used in several places is replaced by one layer in all of them.
    """
    made: dict[int, nn.Module | None] = {}
    for name, layer in list(root.named_modules(remove_duplicate=False)):
        if id(layer) not in made:
            made[id(layer)] = make(name, layer)
        if made[id(layer)] is not None:
            parent, _, child = name.rpartition(".")
            setattr(root.get_submodule(parent), child, made[id(layer)])
    return sum(new is not None for new in made.values())


def _check(experts: Sequence[Expert]) -> None:
    if len(experts) < 2:
        raise ValueError(f"experts: Zoo-Tuning mixes at least two, got {len(experts)}")
    for expert in experts:
        if any(isinstance(layer, RunningStatistics) for layer in expert.module.modules()):
            raise ValueError(
                f"experts: {expert.name} uses its BatchNorm's running statistics in training, but "
                "in Zoo-Tuning they start over; give the experts the option bn=train"
            )
    names = [f"experts[{i}] ({expert.name})" for i, expert in enumerate(experts)]
    reason = difference([expert.module for expert in experts], names)
    if reason is not None:
        raise ValueError(f"experts: Zoo-Tuning mixes networks of one architecture: {reason}")
    for what, read in (
        ("mean", lambda expert: tuple(expert.mean)),
        ("std", lambda expert: tuple(expert.std)),
        ("size", lambda expert: expert.size),
        ("lr_factor", lambda expert: lr_factor(expert.module)),
    ):
        found = [read(expert) for expert in experts]
        if len(set(found)) > 1:
            raise ValueError(
                f"experts: Zoo-Tuning makes them one network, which has one {what}, but theirs are "
                f"{', '.join(map(str, dict.fromkeys(found)))}; give all the same"
            )
    trained = [
        {name: p.requires_grad for name, p in network(expert.module).named_parameters()}
        for expert in experts
    ]
    for name in trained[0]:
        if len({flags[name] for flags in trained}) > 1:
            raise ValueError(
                f"experts: {name} is frozen in some and not in others, but in Zoo-Tuning it is one "
                "parameter; freeze it in all or in none"
            )
