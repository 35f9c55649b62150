"""The parts of a hub built again from what a saved model says of them, for weights to be put in.

All was checked when the hub was first built, and its sizes were written down: nothing is tried, and
nothing is counted. Parameters have no memory (see ``empty``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..model import (
    ExpertOrigin,
    FeatureGenerator,
    FixedRoutes,
    LinearAggregator,
    MLPAggregator,
    NewcomerAggregator,
    NewcomerGenerator,
    PathwayGenerator,
    SumAggregator,
)
from .aliases import canonical
from .build import finish_expert, start_expert
from .empty import without_memory
from .errors import HubError
from .expert import Expert
from .registry import find
from .router import EXPERT, NETWORK, detached
from .source import HeadTask, HubModel, PlainTask
from .spec import ExpertSpec

AGGREGATOR_KINDS = {"linear": LinearAggregator, "sum": SumAggregator, "mlp": MLPAggregator}


def rebuild_expert(
    origin: ExpertOrigin, task: HeadTask, input_size: int, weights: Path | None = None
) -> Expert:
    """The expert that ``origin`` names, with the task's head; HubError where its source knows the
    name no longer.

    weights: a file that its body's are read from; None: its parameters have no memory.
    """
    spec = ExpertSpec.parse(origin.spec)
    model = find_model(spec, origin.config)

    def make() -> Expert:
        expert = start_expert(spec, model, task, spec.size or input_size)
        if weights is not None:
            model.load(expert, weights)
        finish_expert(expert, task, input_size, origin.label)
        return expert

    return make() if weights is not None else without_memory(make, lambda made: made.module)


def find_model(spec: ExpertSpec, config: str | None) -> HubModel:
    """What is known of an expert's network. config: as of ``ExpertOrigin``; where it is there, no
    folder and no repository is looked for."""
    if config is None:
        return find(spec)
    from .timm_models import described

    model = described(canonical(spec.name), config, None)
    changed = {k: getattr(spec, k) for k in ("mean", "std") if getattr(spec, k) is not None}
    return dataclasses.replace(model, **changed)


def rebuild_generator(
    described: Mapping[str, Any],
    router: str | None,
    experts: Sequence[Expert],
    input_size: int | None,
) -> nn.Module | None:
    """The generator that ``model.describe`` described; None of one of a user's own."""
    kind, num_experts = described["kind"], len(experts)
    if kind == "fixed":
        return FixedRoutes(described["experts"], described["weights"], num_experts)
    if kind == "image":
        sizes = {name: described[name] for name in ("in_channels", "width", "stride")}
        return without_memory(lambda: PathwayGenerator(num_experts, **sizes), lambda made: made)
    if kind == "features":
        return _on_features(described, router or "", experts, input_size)
    if kind == "newcomers":
        count = described["newcomers"]
        old = experts[: num_experts - count]
        before = rebuild_generator(described["generator"], router, old, input_size)
        if before is None:
            return None
        make = functools.partial(NewcomerGenerator, before, described["k"], count)
        return without_memory(make, lambda made: made)
    return None


def _on_features(
    described: Mapping[str, Any], router: str, experts: Sequence[Expert], input_size: int | None
) -> nn.Module | None:
    kind, _, name = router.partition(":")
    if kind == NETWORK:
        spec = dataclasses.replace(ExpertSpec.parse(name), size=described["size"])
        origin = ExpertOrigin(str(spec), name, "")
        try:
            source = rebuild_expert(origin, PlainTask(1), input_size)
        except HubError as error:
            raise HubError(*(f"router: {problem}" for problem in error.problems)) from None
    elif kind == EXPERT:
        source = experts[int(name)]
    else:
        return None
    source, features = detached(source), described["num_features"]
    # With memory: its buffers hold numbers that no file keeps.
    return FeatureGenerator(
        source, len(experts), features, source.mean, source.std, own=kind == NETWORK
    )


def rebuild_aggregator(
    described: Mapping[str, Any], num_experts: int, num_outputs: int
) -> nn.Module | None:
    """The aggregator that ``model.describe`` described; None of one of a user's own."""
    kind = described["kind"]
    if kind == "newcomers":
        sizes = described["num_old"], described["newcomers"]
        before = rebuild_aggregator(described["aggregator"], sizes[0], num_outputs)
        return None if before is None else NewcomerAggregator(before, *sizes)
    if kind not in AGGREGATOR_KINDS:
        return None
    options = {"hidden": described["hidden"]} if kind == "mlp" else {}
    make = functools.partial(AGGREGATOR_KINDS[kind], num_experts, num_outputs, **options)
    return without_memory(make, lambda made: made)
