"""What a model is, as plain data: what, with its weights, builds it again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import nn

from .aggregator import LinearAggregator, MLPAggregator, SumAggregator
from .feature_generator import FeatureGenerator
from .fixed_routes import FixedRoutes
from .generator import PathwayGenerator
from .newcomers import NewcomerAggregator, NewcomerGenerator
from .origin import ExpertOrigin
from .parts import are_channels_last

if TYPE_CHECKING:
    from .pathway import HubPathway


def describe(model: HubPathway) -> dict[str, Any]:
    """A ``HubPathway`` as JSON can hold it.

    "experts": of each its "spec", None where it is a module of one's own, "label" and "module", the
    class of its network, and, of one in a folder or a repository of timm's, "config", what is said
    there of it. "generator" and "aggregator": a "kind" and what that kind needs; "module": one of
    one's own, and its class. "policy": what ``RoutingPolicy.from_dict`` reads, or None. "frozen":
    the parameters without gradients. "input_size", "router" and "task" as the model's origin has
    them; None of a model that was made of modules alone.

    Raises ValueError for a policy of another number of experts than the model has by now.
    """
    origin = model.origin
    if model.policy is not None:
        model.policy.check(model.k, len(model.experts))
    return {
        "experts": [_expert(expert) for expert in origin.experts],
        "k": model.k,
        "num_outputs": model.num_outputs,
        "min_group": model.min_group,
        "renormalize": model.renormalize,
        "policy": None if model.policy is None else model.policy.to_dict(),
        "normalized": model.input_mean is not None,
        "generator": _generator(model.generator),
        "aggregator": _aggregator(model.aggregator),
        "input_size": origin.input_size,
        "router": origin.router,
        "task": None if origin.task is None else dict(origin.task),
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "channels_last": are_channels_last(model.experts),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _expert(expert: ExpertOrigin) -> dict[str, Any]:
    named = {"spec": expert.spec, "label": expert.label, "module": expert.module}
    return named if expert.config is None else named | {"config": json.loads(expert.config)}


def expert_origins(described: dict[str, Any]) -> tuple[ExpertOrigin, ...]:
    """The experts of a ``describe``d model."""
    return tuple(
        ExpertOrigin(
            expert["spec"],
            expert["label"],
            expert["module"],
            json.dumps(expert["config"]) if "config" in expert else None,
        )
        for expert in described["experts"]
    )


def _generator(generator: nn.Module) -> dict[str, Any]:
    # Not isinstance: a class of a user's own may compute something else.
    if type(generator) is FixedRoutes:
        return {
            "kind": "fixed",
            "experts": list(generator.experts),
            "weights": list(generator.weights),
        }
    if type(generator) is PathwayGenerator:
        sizes = {name: getattr(generator, name) for name in ("in_channels", "width", "stride")}
        return {"kind": "image", **sizes}
    if type(generator) is FeatureGenerator:
        described = {"num_features": generator.num_features, "own": generator.own}
        size = {"size": getattr(generator.source, "size", None)} if generator.own else {}
        return {"kind": "features", **described, **size}
    if type(generator) is NewcomerGenerator:
        before = _generator(generator.generator)
        found = {"k": generator.k, "newcomers": len(generator.clean)}
        return {"kind": "newcomers", "generator": before, **found}
    return {"kind": "module", "module": type(generator).__name__}


def _aggregator(aggregator: nn.Module) -> dict[str, Any]:
    if type(aggregator) is MLPAggregator:
        return {"kind": "mlp", "hidden": aggregator.expand.out_features}
    for kind, name in ((LinearAggregator, "linear"), (SumAggregator, "sum")):
        if type(aggregator) is kind:
            return {"kind": name}
    if type(aggregator) is NewcomerAggregator:
        before, found = _aggregator(aggregator.aggregator), {"newcomers": aggregator.count}
        return {"kind": "newcomers", "aggregator": before, "num_old": aggregator.num_old, **found}
    return {"kind": "module", "module": type(aggregator).__name__}
