"""From a routed hub of frozen bodies to one that ``fit`` trains end to end.

Which experts go on: backward elimination on the shelf's validation images (``runs.prune``). Of all
experts the one is dropped without which the hub is best, its images going to the others, until
``top`` are left. That looks at what they do together: the most asked ones may know the same images.

What they start with: their heads, and of router and aggregator what was learned of these experts.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.tensor_file import replace_file
from ..features.bodies import RANDOM, ends_linearly, open_body
from ..features.shelf import ShelfModel
from ..hub.aliases import FILE_PREFIX
from ..hub.spec import ExpertSpec
from ..model import NewcomerGenerator
from ..runs.prune import Loss, Losses
from ..runs.start import Start
from .parts import ShelfFeatureGenerator
from .prune import answers_of
from .run import ShelfHub
from .save import KINDS

BODIES = "bodies"  # the folder of those that no name stands for
UNUSUAL = re.compile(r"[^\w.-]+")  # in the name of a file


@dataclass(frozen=True)
class Chosen:
    """The experts that go on. kept: their numbers in the hub, ascending. asked: of each, the share
    of the validation images that the whole hub asks it about. value: the whole hub's metric on
    them. loss: what these experts alone lose; None: all go on. images: how many images."""

    kept: tuple[int, ...]
    asked: tuple[float, ...]
    value: float
    loss: Loss | None
    images: int


def choose(hub: ShelfHub, top: int) -> Chosen:
    """Chooses ``top`` experts.

    Raises ValueError unless they are K..M, there are validation images, and no newcomer has joined
    the hub, which takes the place of others: what is lost without these is not known then."""
    count, k = len(hub.models), hub.model.k
    if isinstance(top, bool) or not isinstance(top, int) or not k <= top <= count:
        raise ValueError(
            f"top: expected an integer in {k}..{count}, since an image asks k={k} of "
            f"the {count} experts of {hub.folder}, got {top!r}"
        )
    if isinstance(hub.model.generator, NewcomerGenerator):
        raise ValueError(
            f"{hub.folder}: `hubpath fit` has no router of the form that a newcomer's is of; "
            "unfreeze the hub that it was added to, or fit one with it"
        )
    numbers = hub.shelf.splits["validation"]
    if not len(numbers):
        raise ValueError(
            f"{hub.shelf.folder} has no validation images, by which experts are chosen; extract a "
            "shelf of data with some"
        )
    losses = Losses(answers_of(hub, numbers), hub.task)
    asked, kept, loss = losses.asked(), tuple(range(count)), None
    if top < count:
        step = next(step for step in losses.eliminate() if len(step.kept) == top)
        kept, loss = step.kept, step.loss
    return Chosen(kept, tuple(asked[i] for i in kept), losses.value, loss, len(numbers))


def start_of(hub: ShelfHub) -> Start:
    """What a hub of the same experts starts with."""
    model = hub.model
    return Start(
        hub.shelf.classes,
        hub.labels,
        tuple((e.layer.weight.detach(), e.layer.bias.detach()) for e in model.experts),
        model.generator.state_dict(),
        model.aggregator.state_dict(),
        images=hub.shelf.images(),
    )


@dataclass(frozen=True)
class FitPlan:
    """What ``fit`` is to be told. hub: names of the experts. size: pixels a side of its images.
    settings: others, by name, as --set takes them. notes: where it begins otherwise than the frozen
    hub left off."""

    hub: tuple[str, ...]
    size: int
    settings: dict[str, Any]
    notes: tuple[str, ...]


def plan_fit(hub: ShelfHub, out: Path) -> FitPlan:
    """How ``fit`` builds the experts of a hub, and a router and an aggregator of its form.

    Images are as large as the largest of the experts' own, and those of the others are resized
    inside. BatchNorm keeps its running statistics, by which the heads' features were made: those of
    the few rows that an expert gets are others. Bodies of random weights, which no name stands for,
    are written to files in ``out``.

    Raises ValueError or HubError: a body that cannot be opened any more, is another, or has a head
    that is more than a linear layer.
    """
    models = [hub.shelf.models[i] for i in hub.models]
    size = max(model.size for model in models)
    names = tuple(_body_name(hub, model, size, out) for model in models)
    small = [model.label for model in models if model.size != size]
    notes = []
    if small:
        notes.append(
            f"images are {size} px, and {', '.join(small)} resizes them to its own size: its "
            "outputs begin close to the frozen ones, not equal"
        )
    settings, router_notes = _router_settings(hub, size, out)
    settings["aggregator"] = KINDS[type(hub.model.aggregator)]
    return FitPlan(names, size, settings, (*notes, *router_notes))


def _router_settings(hub: ShelfHub, size: int, out: Path) -> tuple[dict[str, Any], list[str]]:
    """(what builds a router of the frozen one's form, what is not as it was)."""
    generator = hub.model.generator
    settings: dict[str, Any] = {"renormalize": True} if hub.model.renormalize else {}
    if isinstance(generator, ShelfFeatureGenerator):
        watched = hub.shelf.models[hub.watched]
        settings["router"] = f"network:{_body_name(hub, watched, size, out, head=False)}"
        resized = (
            f"the router looks at {watched.label}, which resizes images of {size} px to its own "
            "size: its routes begin close to the frozen hub's, not equal"
        )
        return settings, [] if watched.size == size else [resized]
    saw = hub.shelf.record.router_size
    stride = max(1, round(generator.stride * size / saw))
    settings |= {"generator_width": generator.width, "generator_stride": stride}
    if size == saw:
        return settings, []
    return settings, [
        f"the router learned on images resized to {saw} px, and looks at {size} px now: its "
        "routes begin close to the frozen hub's, not equal"
    ]


def _body_name(hub: ShelfHub, model: ShelfModel, size: int, out: Path, head: bool = True) -> str:
    """What a hub of images of ``size`` pixels calls a body, which is opened to see that it is the
    one, and, where it is to get a head, that the frozen head can be that."""
    body = open_body(model, hub.shelf.record.seed)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (2, 3, model.size, model.size), dtype=torch.uint8, generator=draw)
    if head and not ends_linearly(body, noise):
        raise ValueError(
            f"{model.label}: its network ends with more than one linear layer on its features, so "
            "that the frozen hub's head cannot be its head; fit a hub of a shelf without it"
        )
    spec = ExpertSpec.parse(model.name)
    if model.weights.startswith(RANDOM):
        stem = f"{model.position}-{UNUSUAL.sub('_', model.label)}"
        path = (out / BODIES / f"{stem}.safetensors").absolute()
        replace_file(path, body.body.state_dict())
        spec = dataclasses.replace(spec, name=f"{FILE_PREFIX}{path}", arch=spec.arch or spec.name)
    own_size = None if model.size == size else model.size
    return str(dataclasses.replace(spec, size=own_size, batchnorm="running" if head else None))
