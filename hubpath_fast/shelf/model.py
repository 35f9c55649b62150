"""A Hub-Pathway on a shelf's features: samples are numbers of rows, experts are linear heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..model import HubPathway, add_newcomer, make_aggregator
from ..model.origin import ExpertOrigin, Origin
from .executor import GroupedHeads
from .parts import FeatureHead, ShelfFeatureGenerator, ShelfImageGenerator

if TYPE_CHECKING:
    from ..features import Shelf
    from .heads import FittedHead

IMAGE, FEATURES = "image", "features"
# A linear aggregator has M*C*C weights: 2.6 M for 256 experts of 100 classes. A block of C*C of
# them learns from its own expert's rows, which are few: of a batch of 256 with K = 2 and M = 64, 8.
MIN_EXPERTS_FOR_SUM = 64


def choose_aggregator(kind: str, num_experts: int, num_outputs: int) -> nn.Module:
    """An aggregator by name. "auto": the weighted sum from ``MIN_EXPERTS_FOR_SUM`` experts on, else
    as of ``make_aggregator``."""
    if kind == "auto" and num_experts >= MIN_EXPERTS_FOR_SUM:
        kind = "sum"
    return make_aggregator(kind, num_experts, num_outputs)


def build_hub(
    shelf: Shelf,
    models: Sequence[int],
    k: int,
    router: str = IMAGE,
    heads: Sequence[FittedHead] | None = None,
    aggregator: str = "auto",
    *,
    width: int = 16,
    stride: int = 1,
    renormalize: bool = False,
) -> HubPathway:
    """A Hub-Pathway whose experts are heads on features of some of a shelf's models.

    Its input are numbers ``view * n + image``, float64 [N]; its executor is ``GroupedHeads``.

    Args:
        models: numbers of models on the shelf, in the order of the experts.
        k: K, active experts of a sample.
        router: "image", a ``PathwayGenerator`` on the shelf's pixels, or "features:LABEL", linear
            heads on the features of that model, which is to run on every image and is no expert.
        heads: of these models, that the experts start from; None: new ones.
        aggregator: see ``choose_aggregator``.
        width, stride: of the ``PathwayGenerator``.
        renormalize: as of ``HubPathway``.

    Raises:
        ValueError: a model twice or none, k out of range, fewer images than classes, an unknown
            router or one of a routed model, a shelf without pixels.
    """
    models = list(models)
    if len(set(models)) != len(models):
        raise ValueError(f"models: expected each model once, got {models}")
    check_choice(shelf, len(models), k)
    generator = _generator(shelf, models, router, width, stride)
    experts = [FeatureHead(shelf.features(i), len(shelf.classes)) for i in models]
    if heads is not None:
        for expert, head in zip(experts, heads, strict=True):
            start_from(expert, head)
    count, outputs = len(models), len(shelf.classes)
    model = HubPathway(
        experts,
        generator,
        choose_aggregator(aggregator, count, outputs),
        k,
        num_outputs=outputs,
        executor=GroupedHeads(),
        renormalize=renormalize,
    )
    model.origin = Origin(tuple(_origin(shelf, i) for i in models))
    return model


def join(model: HubPathway, shelf: Shelf, index: int) -> FeatureHead:
    """Appends a new head on the features of one more model of the shelf, which is not asked before
    its score says so: see ``model.newcomers``. Raises ValueError for a model that none can join."""
    head = FeatureHead(shelf.features(index), len(shelf.classes))
    add_newcomer(model, head, origin=_origin(shelf, index))
    return head


def _origin(shelf: Shelf, index: int) -> ExpertOrigin:
    return ExpertOrigin(None, shelf.models[index].label, FeatureHead.__name__)


@torch.no_grad()
def start_from(expert: FeatureHead, head: FittedHead) -> None:
    """Gives an expert the weights of a head that was fitted on the same features."""
    expert.layer.weight.copy_(head.weight)
    expert.layer.bias.copy_(head.bias)


def router_model(shelf: Shelf, router: str) -> int | None:
    """The number of the model whose features a router looks at; None: it looks at the images.

    Raises ValueError for a router of another form, or a model that the shelf has not.
    """
    kind, _, label = router.partition(":")
    if router == IMAGE:
        return None
    if kind != FEATURES or not label:
        raise ValueError(f"router: expected image or features:LABEL, got {router!r}")
    return shelf.find(label)


def check_choice(shelf: Shelf, count: int, k: int) -> None:
    """Raises ValueError unless ``count`` experts of a shelf can be trained, K of them active."""
    images, classes = shelf.record.sizes[0], len(shelf.classes)
    if images < classes:
        raise ValueError(
            f"shelf: {shelf.folder} has {images} training images of {classes} classes, too "
            "few to train on; extract a shelf of more images"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= count:
        raise ValueError(
            f"k: expected an integer in 1..{count}, the experts that are routed, got {k!r}; take a "
            "smaller k, or more experts"
        )


def _generator(
    shelf: Shelf, models: Sequence[int], router: str, width: int, stride: int
) -> nn.Module:
    watched = router_model(shelf, router)
    if watched is None:
        pixels = shelf.pixels()
        if pixels is None:
            raise ValueError(
                f"router: {shelf.folder} has no pixels, which a router on the image looks at; "
                "extract a shelf with some, or take features:LABEL"
            )
        return ShelfImageGenerator(len(models), pixels, width, stride)
    if watched in models:
        raise ValueError(
            f"router: {shelf.models[watched].label} is an expert that is routed, so its features "
            "are not known before it runs; look at a model that is no expert, or leave it out of "
            "the experts"
        )
    return ShelfFeatureGenerator(len(models), shelf.features(watched))
