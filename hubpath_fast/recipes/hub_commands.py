"""``hubpath hub list`` and ``hubpath hub show``: what can be an expert, and what it costs.

Nothing here uses the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..hub.build import default_input_size, working_size
from ..hub.costs import TASK, Costs, costs, generator_text, module_flops
from ..hub.errors import HubError
from ..hub.names import all_names, closest, list_models
from ..hub.registry import SOURCES, find
from ..hub.router import generator_size
from ..hub.source import skeleton
from ..hub.spec import HUBS, ExpertSpec, read_specs, split_names
from ..model import PathwayGenerator

K = 2  # of the router that ``show`` tells of


@dataclass(frozen=True)
class Entry:
    """What ``show`` says of one expert: the text it was asked by, its source's facts, its costs.
    place: the weights' local path, where they are or belong; cached: whether they are there;
    problem: why they cannot be read, where that is for the user to mend."""

    spec: str
    name: str
    native_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str | None
    place: str | None
    cached: bool
    problem: str | None
    costs: Costs


def list_hub(pattern: str | None = None) -> list[str]:
    """The names that match ``pattern``; without one, the named hubs and an overview of the sources.

    Raises HubError, with the closest names, if nothing matches.
    """
    if pattern is None:
        lines = ["named hubs:"]
        lines += [f"  {hub}: {', '.join(names)}" for hub, names in HUBS.items()]
        lines.append("sources:")
        for source in SOURCES:
            prefix = source.partition("/")[0] + "/"
            count = sum(name.startswith(prefix) for name in all_names())
            local = "of the Hugging Face hub" if source.startswith("hf-hub:") else "of this machine"
            lines.append(f"  {source}: " + (f"{count} names" if count else local))
        lines.append('`hubpath hub list "timm/resnet50*"` lists the names of a pattern')
        return lines
    names = list_models(pattern)
    if not names:
        raise HubError(f"no hub or model matches {pattern!r}; {closest(pattern)}")
    return names


def show(names: str | Sequence[str]) -> list[Entry]:
    """One entry for each expert of some names (in one text with commas between), named hubs among
    them; HubError with all that is unknown."""
    specs = _specs(names)
    entries, problems = [], []
    for spec in specs:
        try:
            entries.append(_entry(spec))
        except HubError as error:
            problems += error.problems
    if problems:
        raise HubError(*problems)
    return entries


def router(names: str | Sequence[str]) -> str:
    """What routes to such a hub by default, at the size that suits it and with K = 2; and its
    share, for people. HubError as of ``show``, or where an expert refuses images of that size."""
    specs = _specs(names)
    size, k = default_input_size(specs), min(K, len(specs))
    flops = []
    for spec in specs:
        model = find(spec)
        flops.append(module_flops(skeleton(model, TASK), working_size(spec, model, TASK, size)))
    active = None if None in flops else k * sum(flops) / len(flops)
    width, stride = generator_size(len(specs), size, active, None, None)
    if active is None:
        return generator_text(width, stride, size)
    share = PathwayGenerator.flops(len(specs), width, stride, size) / active
    return (
        f"{generator_text(width, stride, size)}, {100 * share:.1f} % of the FLOPs of K = {k} mean "
        f"experts at {size} x {size}"
    )


def _specs(names: str | Sequence[str]) -> list[ExpertSpec]:
    return read_specs(split_names(names) if isinstance(names, str) else names)


def _entry(spec: ExpertSpec) -> Entry:
    model = find(spec)
    weights = model.weights
    path = weights.cached() if weights is not None else None
    return Entry(
        spec=str(spec),
        name=model.name,
        native_size=model.native_size,
        mean=model.mean,
        std=model.std,
        origin=None if weights is None else weights.origin(),
        place=None if weights is None else str(path or weights.place()),
        cached=path is not None,
        problem=None if weights is None else weights.problem(),
        costs=costs(model, spec.size or model.native_size),
    )
