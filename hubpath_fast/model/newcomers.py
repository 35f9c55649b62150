"""Experts that join a trained hub without changing what it says of samples that they do not get.

A softmax over one score more would change every sample's weights. So a newcomer's score counts for
a sample only where it is among the K largest; elsewhere the newcomer has probability 0, and the
weights are the softmax over the others as before. The old generator and the old aggregator are kept
whole, to the bit: a product with one column more may round the others differently.

    z = w f + b where that is among the K largest of all scores before it, else never asked
    y = A(old experts) + sum over newcomers of p * output

f are the features that the old generator makes its scores of. Newcomers have an order: one counts
against the old experts and the newcomers before it. Letters: N samples, M experts, of which M' are
newcomers, K active, F features, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import functional as HF
from ..routing import Routing
from .aggregator import LinearAggregator, SumAggregator
from .batch_norm import check_batch_norm
from .feature_generator import FeatureScores
from .fixed_routes import NEVER
from .generator import PathwayGenerator
from .normalization import normalization_rows
from .origin import ExpertOrigin

if TYPE_CHECKING:
    from .pathway import HubPathway

# How far a newcomer's score must be above the K-th: softmax's roundings put nothing between them.
MARGIN = 2.0**-10


class NewcomerGenerator(nn.Module):
    """A generator with newcomers behind its experts.

    Args:
        generator: of the hub as it was; kept as ``generator``.
        k: K of the hub as it was: a newcomer is asked where its score is among the K largest.
        count: M', newcomers to begin with; none of them is asked before it is calibrated.

    ``clean`` and ``noise`` hold a linear map [F] -> [1] for each newcomer: its score and its raw
    noise scale, which starts as the mean of the others'.

    Input and output as of ``generator``, with M' columns more; a newcomer's clean score is
    ``NEVER`` where it is not asked.
    """

    def __init__(self, generator: PathwayGenerator | FeatureScores, k: int, count: int = 0):
        super().__init__()
        self.generator, self.k = generator, k
        self.clean, self.noise = nn.ModuleList(), nn.ModuleList()
        for _ in range(count):
            self.append()

    @property
    def num_old(self) -> int:
        """Experts of the hub as it was."""
        return self.generator.num_experts

    @property
    def num_experts(self) -> int:
        return self.num_old + len(self.clean)

    @property
    def not_captured(self) -> str | None:
        """Why no graph may be captured of this; None: it may."""
        return getattr(self.generator, "not_captured", None)

    @torch.no_grad()
    def append(self) -> None:
        """One more newcomer."""
        old = self.generator.noise
        clean, noise = (nn.Linear(old.in_features, 1).to(old.weight) for _ in range(2))
        clean.weight.zero_()
        clean.bias.fill_(NEVER)
        noise.weight.copy_(old.weight.mean(dim=0, keepdim=True))
        noise.bias.copy_(old.bias.mean(dim=0, keepdim=True))
        self.clean.append(clean)
        self.noise.append(noise)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.from_seen(self.seen(x))

    def seen(self, x: Tensor) -> Tensor:
        """As of ``generator``."""
        return self.generator.seen(x)

    def from_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of images of which it has ``seen`` x."""
        features = self.generator.features(x)
        clean = self.generator.clean(features)
        for score in self.clean:
            least = kth_largest(clean, self.k)
            z = score(features)
            clean = torch.cat([clean, torch.where(z > least + MARGIN, z, NEVER)], dim=1)
        noise = [self.generator.noise(features), *(scale(features) for scale in self.noise)]
        return clean, torch.cat(noise, dim=1)

    def extra_repr(self) -> str:
        return f"k={self.k}, newcomers={len(self.clean)}"


def kth_largest(clean: Tensor, k: int) -> Tensor:
    """[N, M] -> [N, 1]: what a newcomer's score must be above."""
    return clean.detach().topk(k, dim=1).values[:, -1:]


class NewcomerAggregator(nn.Module):
    """An aggregator with newcomers behind its experts, whose weighted outputs are added as they
    are: a linear block after a linear head would say nothing that the head cannot.

    aggregator: of the hub as it was, on [N, (M - M')*C, ...]; kept as ``aggregator``. num_old:
    M - M'. count: M'.
    """

    def __init__(self, aggregator: nn.Module, num_old: int, count: int = 0):
        super().__init__()
        self.aggregator, self.num_old, self.count = aggregator, num_old, count

    def forward(self, concat: Tensor) -> Tensor:
        """[N, M*C, ...] -> [N, C, ...]."""
        parts = concat.unflatten(1, (self.num_old + self.count, -1))
        # Contiguous as it was without newcomers: the product must round as it did.
        y = self.aggregator(parts[:, : self.num_old].flatten(1, 2).contiguous())
        for i in range(self.count):
            y = y + parts[:, self.num_old + i].to(y.dtype)
        return y

    def from_rows(self, outputs: Tensor, routing: Routing) -> Tensor:
        """The same prediction from the rows [R, C, ...]; a batch that no newcomer gets a sample of
        is aggregated exactly as before."""
        if isinstance(self.aggregator, SumAggregator):  # newcomers are added as the others are
            return self.aggregator.from_rows(outputs, routing)
        linear = isinstance(self.aggregator, LinearAggregator)
        if not linear or any(routing.counts()[self.num_old :]):
            return self(HF.combine(outputs, routing))
        return self.aggregator.from_rows(outputs, before(routing, self.num_old))

    def extra_repr(self) -> str:
        return f"num_old={self.num_old}, newcomers={self.count}"


def before(routing: Routing, num_old: int) -> Routing:
    """A routing that gives newcomers no row, as one of the hub as it was."""
    return Routing(
        routing.weights,
        routing.mean[:num_old],
        routing.experts,
        routing.offsets[: num_old + 1],
        routing.rows,
        routing.positions,
        routing.counts()[:num_old],
    )


def with_old_weights(
    routing: Routing, clean: Tensor, noise: Tensor, num_old: int, renormalize: bool
) -> Routing:
    """A routing without noise, with the weights to the bit as they were before each newcomer that
    a sample is not sent to.

    In exact arithmetic they are that already. But a sum's rounding depends on how many terms it
    has, zeros included: a CPU's vectors begin to be added up in pairs where M fills one of them.
    clean, noise: [N, M], of a ``NewcomerGenerator``.
    """
    weights = None
    for width in range(max(num_old, routing.k), clean.shape[1] + 1):
        part = clean[:, :width].contiguous(), noise[:, :width].contiguous()
        own = HF.noisy_topk(*part, routing.k, None, renormalize).weights
        asked = clean[:, width - 1 : width] > NEVER
        weights = own if weights is None else torch.where(asked, own, weights)
    routing.weights = weights
    return routing


def add_newcomer(
    model: HubPathway,
    module: nn.Module,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    origin: ExpertOrigin | None = None,
) -> None:
    """Appends ``module`` to the experts, in place, so that no prediction changes: it is not asked
    before the last of ``model.generator.clean`` says so.

    Other than ``HubPathway.add_expert``, it keeps predictions as they are also later, for samples
    that the newcomer does not get. origin: what it was made from; None: a module of one's own.
    Other args and errors as of that.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: expected an nn.Module, got {type(module).__name__}")
    check_extendable(model)
    check_batch_norm([("module", module)])
    rows = normalization_rows(model.input_mean, mean, std)
    if not isinstance(model.generator, NewcomerGenerator):
        count = len(model.experts)
        model.generator = NewcomerGenerator(model.generator, model.k).train(model.training)
        model.aggregator = NewcomerAggregator(model.aggregator, count).train(model.training)
    model.generator.append()
    model.aggregator.count += 1
    if rows is not None:
        model.input_mean = torch.cat([model.input_mean, rows[0]])
        model.input_std = torch.cat([model.input_std, rows[1]])
    own = ExpertOrigin.of_module(module) if origin is None else origin
    model.origin = model.origin.with_expert(own)
    device = model.generator.noise[-1].weight.device
    model.experts.append(module.to(device).train(model.training))
    model._restart_executor()


def check_extendable(model: HubPathway) -> None:
    """Raises ValueError for a model that no newcomer can join."""
    if model.frozen is not None:
        raise ValueError(
            "model: no newcomer can join a model that was frozen for inference; add it before "
            "freeze_for_inference"
        )
    kinds = (PathwayGenerator, FeatureScores, NewcomerGenerator)
    if not isinstance(model.generator, kinds):
        found = type(model.generator).__name__
        raise ValueError(
            "generator: a newcomer's score is made of the features of a PathwayGenerator or a "
            f"FeatureGenerator, and this is a {found}; train a hub with one of these"
        )
