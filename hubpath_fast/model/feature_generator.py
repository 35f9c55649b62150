"""A generator that looks at the features of a network which is there: an expert's, or its own.

Our choice, beside the paper's network on the image (equation 3): clean = L_c(norm(f(x))) and
noise = L_n(norm(f(x))), where f is a network without its head, L_c and L_n are linear, and norm is
LayerNorm, since networks' features differ in scale. Shapes: N samples, F features, M experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import functional as HF
from ..devices import eval_mode
from .generator import start_equal


class Source(Protocol):
    """What features come from, an ``Expert``: ``module`` normalised images -> outputs."""

    module: nn.Module
    name: str

    def pooled(self, x: Tensor) -> Tensor:
        """Normalised images [N, 3, S, S] -> [N, F]."""


class FeatureScores(nn.Module):
    """Two linear heads on features that lie there: the part of a ``FeatureGenerator`` that learns.

    num_experts: M, the width of both heads. num_features: F. noise_init: as of
    ``PathwayGenerator``. Both heads start with zero weights, so that all experts start equally
    likely.
    """

    def __init__(self, num_experts: int, num_features: int, noise_init: float = 0.0):
        super().__init__()
        self.num_experts, self.num_features = num_experts, num_features
        self.norm = nn.LayerNorm(num_features)
        self.clean = nn.Linear(num_features, num_experts)
        self.noise = nn.Linear(num_features, num_experts)
        start_equal(self.clean, self.noise, noise_init)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.from_seen(self.seen(x))

    def seen(self, x: Tensor) -> Tensor:
        """What it looks at of samples x: the features [N, F] that they are."""
        return x

    def from_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of samples of which it has ``seen`` x."""
        x = self.features(x)
        return self.clean(x), self.noise(x)

    def features(self, x: Tensor) -> Tensor:
        """[N, F]: what both heads make the scores of, of samples of which it has ``seen`` x."""
        return self.norm(x)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, num_features={self.num_features}"


class FeatureGenerator(FeatureScores):
    """Two linear heads on a network's pooled features.

    Args:
        source: what makes the features. It runs in evaluation mode and without gradients: with
            them the task and exploration losses would reach an expert past its own rows, where
            equation 6 lets them reach the generator alone; and batch statistics of all samples
            would mix with those of the expert's own.
        num_experts: M, the width of both heads. num_features: F.
        mean, std: [channels] of the source's images, in units of images in [0, 1].
        own: whether the network is the generator's own, and frozen: then it is a part of this
            module, with its weights in the state dict. Else it is an expert of the hub, which
            this module only refers to: nothing is copied, so it follows the expert's training, and
            parameters, optimizer and state dict have it once, as an expert's.
        noise_init: as of ``PathwayGenerator``.

    Input: [N, 3, S, S] floats, images in [0, 1]. Output: clean [N, M], noise [N, M].
    """

    def __init__(
        self,
        source: Source,
        num_experts: int,
        num_features: int,
        mean: Sequence[float],
        std: Sequence[float],
        own: bool,
        noise_init: float = 0.0,
    ):
        super().__init__(num_experts, num_features, noise_init)
        self.source = source
        if own:
            self.network = source.module.requires_grad_(False)
        self.own = own
        shape = 1, -1, 1, 1
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)
        self.train(self.training)

    @property
    def always_on(self) -> nn.Module | None:
        """The expert that runs on every sample for its features; None where the network is own."""
        return None if self.own else self.source.module

    @property
    def not_captured(self) -> str | None:
        """Why no graph may be captured of this; None: it may."""
        return None if self.own else "it reads an expert, which is no part of it"

    def train(self, mode: bool = True) -> FeatureGenerator:
        super().train(mode)
        if self.own:
            self.network.eval()
        return self

    def seen(self, x: Tensor) -> Tensor:
        """What it looks at of images x: the network's features [N, F], without gradients."""
        with torch.no_grad(), eval_mode(self.source.module), _no_autocast_cache(x.device.type):
            return self.source.pooled(x * (1 / self.std) - self.mean / self.std)

    def extra_repr(self) -> str:
        kind = "network" if self.own else "expert"
        return f"num_experts={self.num_experts}, {kind}={self.source.name}"


def always_on(generator: nn.Module) -> FeatureGenerator | None:
    """The part of a generator that runs an expert on every sample; None where there is none."""
    parts = (part for part in generator.modules() if isinstance(part, FeatureGenerator))
    return next((part for part in parts if not part.own), None)


def _no_autocast_cache(device: str) -> contextlib.AbstractContextManager:
    """Autocast of older torch (2.14 looks at the mode) keeps a weight's cast for the next who needs
    it: one made here has no gradient, and the expert would learn nothing from its own rows."""
    dtype = HF.autocast_dtype(device)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype, cache_enabled=False)
