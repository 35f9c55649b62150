"""Which Hub-Pathway is built: the settings of the hub and of the model around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._checks import check_k
from ..executors import EXECUTORS
from ..executors.resident import read_room
from ..fields import S, Settings, setting
from ..model import AGGREGATORS
from .build import check_names
from .router import check_router
from .spec import expand_names, read_specs, split_names


def _names(value: Any) -> Any:
    """ "a, b" and ["a", "b"] -> ("a", "b"), named hubs replaced by their experts."""
    names = split_names(value) if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return value
    return expand_names([name.strip() for name in names if name.strip()])


def _room(value: object) -> object:
    """A number of experts as text, as bytes are."""
    return str(value) if type(value) is int else value


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The experts, and what routes to them; see ``create_model`` and ``HubPathway``."""

    hub: tuple[str, ...] = setting(
        (), "names of models, comma-separated, or a hub of `hubpath hub list`", convert=_names
    )
    pretrained: bool = setting(
        True, "start from the weights that the names stand for; False: random weights, no network"
    )
    k: int = setting(2, "active experts per image", low=1)
    min_group: int = setting(
        2, "with fewer rows than this, an expert's BatchNorm runs on its running statistics", low=1
    )
    head_init: float | None = setting(
        None,
        "standard deviation of the new heads' weights, biases at 0; None: as each network "
        "initialises its own",
        low=0,
    )
    aggregator: str = setting(
        "auto",
        "linear starts as the weighted sum of the experts' outputs; sum stays it; auto: linear, or "
        "sum where linear would have more than 50 M weights (5 experts, 3,163 classes)",
        choices=AGGREGATORS,
    )
    generator_width: int | None = setting(
        None,
        "channels of the generator's first layer; None: what leaves it at most 5 % of the FLOPs of "
        "K mean experts",
        low=1,
    )
    generator_stride: int | None = setting(
        None,
        "of the pooling before the generator; None: by the experts' FLOPs as well, or, where the "
        "width is given, what leaves about 56 pixels a side",
        low=1,
    )
    router: str = setting(
        "image",
        "what routes by: the image; the features of an expert, which then runs on every image "
        "(expert:NAME or its number from 0; expert: the cheapest); or those of a frozen network of "
        "its own (network:NAME)",
        added=True,
    )
    renormalize: bool = setting(False, "divide the K weights by their sum (not in the paper)")
    executor: str = setting("auto", "what runs the experts", choices=EXECUTORS, free=True)
    room: str | None = setting(
        None,
        "memory that experts may take, such as 8GB, or a number of experts: they rest in files, of "
        "a GPU in the host's memory, and the executor runs those that are there; None: all are",
        free=True,
        convert=_room,
    )
    channels_last: bool = setting(
        True,
        "keep images and convolutions with the channels last in memory: faster on most devices",
        free=True,
    )

    def settled(self: S, held: ModelSettings) -> S:
        """With what ``held`` has where it is left to the experts' costs here, the generator's size
        or which expert is the cheapest: of a run that goes on, and whose model is there."""
        changes: dict[str, Any] = {}
        if self.generator_width is None:
            changes = {
                name: getattr(held, name) for name in ("generator_width", "generator_stride")
            }
        if self.router == "expert" and held.router.startswith("expert:"):
            changes["router"] = held.router
        return self.replace(**changes)

    def identity(self) -> dict[str, Any]:
        """As runs older than "auto" have it: up to 50 M weights that is "linear", and beyond it
        their weights fit no other aggregator."""
        identity = super().identity()
        return {**identity, "aggregator": identity["aggregator"].replace("auto", "linear")}

    def check(self) -> None:
        super().check()
        if not self.hub:
            raise ValueError("hub: nothing given; use --hub resnet50.a1_in1k,... or --preset NAME")
        if len(self.hub) < self.k:  # one name, with a default k of 2, is often a wrong one
            check_names(read_specs(self.hub))
        check_k(self.k, len(self.hub))
        check_router(self.router)
        if self.room is not None:
            read_room(self.room)
