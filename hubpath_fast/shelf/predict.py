"""What a frozen hub says of new images, body by body.

A shelf's hub has hundreds of bodies, and an image needs K of them:

    1. the router looks at all images: at their pixels, or at the features of the one model that
       runs on every image
    2. each body that is asked is opened once, runs on its own images alone, and goes
    3. the heads' rows are combined with each image's own routing

So one body is in memory at a time. Features are rounded to the shelf's dtype, in which heads and
router learned them: of an image that is on the shelf the hub says what it said in training.

Letters: n images, M experts, K active, R rows, D features, C classes, S pixels a side.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..features.bodies import features_of, open_body
from ..features.shelf import DTYPES, ShelfModel
from ..routing import Routing
from .parts import Mapped
from .run import ShelfHub

BATCH = 32  # images that a body is given at a time


@dataclass
class Forwards:
    """Passes of images through bodies. images: n. experts: K an image. router: of the model that
    runs on every image, which is ``watched``; None: the router looks at pixels. opened: how often a
    body was built."""

    watched: str | None = None
    images: int = 0
    experts: int = 0
    router: int = 0
    opened: int = 0


class ShelfPredictor:
    """Says what a shelf's hub says of new images.

    hub: of ``open_hub``. device: where bodies run. ``forwards`` counts what was run so far.

    Raises ValueError for a shelf of features of one's own, whose models have no bodies here.
    """

    def __init__(self, hub: ShelfHub, device: str | torch.device = "cpu"):
        self.shelf, self.device = hub.shelf, torch.device(device)
        self.model = copy.deepcopy(hub.model).eval()  # its router will read other images
        self.models = [hub.shelf.models[i] for i in hub.models]
        self.watched = None if hub.watched is None else hub.shelf.models[hub.watched]
        self.bodies = [*self.models, *([] if self.watched is None else [self.watched])]
        self.dtype = DTYPES[hub.shelf.record.dtype]
        self.forwards = Forwards(None if self.watched is None else self.watched.label)
        for model in self.bodies:
            if model.size is None or not model.weights:
                raise ValueError(
                    f"{hub.shelf.folder} holds features of your own, and nothing computes those of "
                    f"{model.label} for other images; extract a shelf of models by their names"
                )

    @property
    def sizes(self) -> list[int]:
        """S of each body that may run: what images are needed at."""
        return sorted({model.size for model in self.bodies})

    @property
    def router_size(self) -> int | None:
        """s of the pixels that the router looks at; None: it looks at features."""
        return self.shelf.record.router_size if self.watched is None else None

    @torch.inference_mode()
    def predict(
        self, images: Mapping[int, Tensor], pixels: Tensor | None = None
    ) -> tuple[Tensor, Routing, dict[int, str]]:
        """(outputs [n, C], float32 on the host; the routing; why images have no answer, whose
        outputs say nothing, by their numbers).

        images: of each of ``sizes``, uint8 [n, 3, S, S], on the host. pixels: uint8 [n, 3, s, s],
        where there is a ``router_size``.

        Raises ValueError or HubError for a body that cannot be opened any more, or is another.
        """
        count = len(next(iter(images.values())))
        failed: dict[int, str] = {}
        if self.watched is not None:
            pixels = self._features(self.watched, images, torch.arange(count), failed)
            self.forwards.router += count
        for part in self.model.generator.modules():
            if isinstance(part, Mapped):
                part.mapped, part.placed = pixels, None
        routing = self.model.route(torch.arange(count, dtype=torch.float64))
        samples = routing.rows.long() // routing.k
        outputs = []
        for expert, model, own in zip(
            self.model.experts, self.models, samples.split(routing.counts()), strict=True
        ):
            if len(own):
                features = self._features(model, images, own, failed)
                outputs.append(expert.layer(features.to(expert.layer.weight.dtype)))
        self.forwards.images += count
        self.forwards.experts += len(samples)
        return self.model._aggregate(torch.cat(outputs), routing), routing, failed

    def _features(
        self, model: ShelfModel, images: Mapping[int, Tensor], own: Tensor, failed: dict[int, str]
    ) -> Tensor:
        """[r, D] of the images ``own`` [r]; 0 of those that a shelf would not keep, which are named
        in ``failed``."""
        body = open_body(model, self.shelf.record.seed, self.device)
        self.forwards.opened += 1
        of_size = images[model.size]
        parts = [features_of(body, of_size[part]).cpu() for part in own.split(BATCH)]
        features = torch.cat(parts)
        stored = features.to(self.dtype)
        wrong = ~stored.isfinite().all(dim=1)
        for i in wrong.nonzero()[:, 0].tolist():
            why = f"are more than {self.shelf.record.dtype} holds, as the shelf keeps them"
            if not features[i].isfinite().all():
                why = "are not finite (NaN or infinite)"
            failed.setdefault(int(own[i]), f"the features of {model.label} {why}")
        return stored.masked_fill(wrong[:, None], 0)
