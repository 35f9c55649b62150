"""The parts of a Hub-Pathway that read a shelf: heads on features, and routers.

Their input are numbers ``view * n + image``, float64 as a Hub-Pathway's rows are floats; router and
heads of a sample thus see the same view. What is read, features and pixels, is mapped from the
shelf's files, and may lie on a device, too (see ``placing``): it is no buffer, so checkpoints are
without it, and no copy of a model copies it.

Letters: V views, n images, N numbers in a batch, D features of a model, M experts, C outputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..model import FeatureScores, PathwayGenerator


class Mapped:
    """Part of a module that reads rows of a tensor that is mapped from a file.

    mapped: [V * n, ...], on the host, by the numbers of rows. placed: the same on a device, or
    None: there rows are then gathered on the host.
    """

    mapped: Tensor
    placed: Tensor | None = None

    def rows(self, numbers: Tensor) -> Tensor:
        """numbers: [N] of any dtype, on any device -> [N, ...] there."""
        here = self.mapped
        if self.placed is not None and self.placed.device == numbers.device:
            here = self.placed
        return here.index_select(0, numbers.to(here.device, torch.int64)).to(numbers.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.mapped)] = self.mapped
        memo[id(self.placed)] = self.placed
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


class FeatureHead(Mapped, nn.Module):
    """A linear head on one model's features: numbers [N] -> outputs [N, C].

    features: [V, n, D] or [n, D], float16 or float32. num_outputs: C. ``layer`` is the linear map;
    it is made in its own dtype, whatever that of the features.
    """

    head_layers = ("layer",)  # all of it is head; see ``model.heads.mark_head``

    def __init__(self, features: Tensor, num_outputs: int):
        super().__init__()
        self.mapped = features.flatten(0, -2)
        self.layer = nn.Linear(features.shape[-1], num_outputs)

    @property
    def features(self) -> Tensor:
        """[V * n, D], mapped."""
        return self.mapped

    def read(self, numbers: Tensor) -> Tensor:
        """The features of numbers [N], [N, D], in the dtype of the head."""
        return self.rows(numbers).to(self.layer.weight.dtype)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.layer(self.read(numbers))


class ShelfImageGenerator(Mapped, PathwayGenerator):
    """A ``PathwayGenerator`` on a shelf's pixels: numbers [N] -> clean [N, M], noise [N, M].

    pixels: uint8 [V, n, 3, s, s]. Other args, and the state dict, as of ``PathwayGenerator``.
    """

    def __init__(self, num_experts: int, pixels: Tensor, width: int = 16, stride: int = 1):
        super().__init__(num_experts, pixels.shape[2], width, stride)
        self.mapped = pixels.flatten(0, 1)

    def seen(self, numbers: Tensor) -> Tensor:
        return super().seen(self.rows(numbers).to(self.stem.weight.dtype) / 255)


class ShelfFeatureGenerator(Mapped, FeatureScores):
    """A ``FeatureGenerator`` whose network's features lie on a shelf: numbers [N] -> clean [N, M],
    noise [N, M].

    features: [V, n, D] or [n, D]. The state dict is that of a ``FeatureGenerator``, but for the
    network.
    """

    def __init__(self, num_experts: int, features: Tensor):
        super().__init__(num_experts, features.shape[-1])
        self.mapped = features.flatten(0, -2)

    def seen(self, numbers: Tensor) -> Tensor:
        """What it looks at: the features [N, D]."""
        return self.rows(numbers).to(self.norm.weight.dtype)
