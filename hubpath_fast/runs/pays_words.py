"""What ``does_routing_pay`` found, and where samples were sent, in sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..measure import Measure

NO_VALIDATION = (
    "whether routing pays was not looked at: there are no validation images (--validation 0.1 "
    "holds some out)"
)

KEPT = {"fixed": "; kept: these experts for every image", "learned": "; kept: the learned routes"}


def listed(names: Sequence[str]) -> str:
    """ "A, B and C"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def points(measure: Measure, value: float) -> str:
    """The size of a difference, without its unit: that of percent is points."""
    return measure.number(abs(value))


def unit(measure: Measure) -> str:
    """Behind such a number: " points", or what the measure has."""
    return " points" if measure.unit == "%" else f" {measure.unit}" if measure.unit else ""


def sentence(found: Mapping[str, Any], measure: Measure, names: Sequence[str]) -> str:
    """Whether routing pays, with numbers; ± is one standard error."""
    if "fixed" not in found:
        return nothing_to_choose(len(names), len(names))
    fixed, added = found["fixed"], found["added"]["fixed"]
    asked, gain = listed(fixed["names"]), points(measure, added["value"])
    size = f"{gain} ± {points(measure, added['error'])}{unit(measure)}"
    values = (
        f"{measure.title} {measure.text(found['learned']['value'])} against "
        f"{measure.text(fixed['value'])}, {found['images']} {found['split']} images"
    )
    if added["low"] > 0:
        adds = "adds" if measure.better == "max" else f"lowers {measure.title} by"
        return f"routing {adds} {size} over always asking {asked} ({values})"
    if added["value"] > 0:
        sign = "+" if measure.better == "max" else "-"
        return (
            f"routing is not shown to pay here: {sign}{size} over always asking {asked} ({values})"
        )
    better = "as good" if not gain.strip("0.") else f"{size} better"
    return f"routing does not pay here: ask {asked} (always asking them is {better}: {values})"


def nothing_to_choose(count: int, k: int) -> str:
    """Where K = M."""
    if count == 1:
        return "routing has nothing to choose: the hub has one expert"
    return f"routing has nothing to choose: all {k} of {count} experts are asked about every image"


def quality_sentence(found: Mapping[str, Any], measure: Measure) -> str | None:
    """How good the weights are (figure 3b); None where that was not looked at."""
    quality = found.get("quality")
    if quality is None or not quality["counted"]:
        return None
    return (
        f"on {quality['counted']} of {quality['samples']} {found['split']} images some expert does "
        f"not fail; there the most trusted one has {measure.title} "
        f"{measure.text(quality['top'])}, a random one {measure.text(quality['random'])}"
    )


def routes_sentence(routes: Mapping[str, Any], names: Sequence[str]) -> str:
    """Where an evaluation's samples were sent."""
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in zip(names, routes["share"], strict=True)
    )
    sets, k = routes["sets"], round(sum(routes["share"]))
    text = f"asked without noise: {shares} of the images; "
    text += f"{sets} different set{'s' * (sets > 1)} of {k}"
    if "mutual_information" in routes:
        text += f", mutual information with the class {routes['mutual_information']:.2f} nats"
    return text


def kept_sentence(found: Mapping[str, Any], fallback: str, fixed: bool, measure: Measure) -> str:
    """What the run keeps, and why. fixed: whether validation prefers the fixed set."""
    if "fixed" not in found:
        return "kept: the learned routes (there was nothing to choose)"
    names = listed(found["fixed"]["names"])
    values = [measure.text(found[kind]["value"]) for kind in ("learned", "fixed")]
    if fallback == "none":
        hint = f"; --resume --fallback fixed keeps {names} for every image" if fixed else ""
        return f"kept: the learned routes{hint}"
    if fixed:
        return (
            f"kept: {names} for every image, without the router (validation: {values[1]}, at least "
            f"the {values[0]} of the learned routes)"
        )
    return f"kept: the learned routes (validation: {values[0]}, above the {values[1]} of {names})"


def routing_of_seeds(
    seeds: Sequence[int], results: Sequence[Mapping[str, Any]], measure: Measure
) -> list[str]:
    """Lines on results of several seeds: what each found and keeps, and the mean. Results without
    "routing", of earlier versions, have none."""
    held = {s: r["routing"] for s, r in zip(seeds, results, strict=True) if r.get("routing")}
    lines = [
        f"seed {seed}: {found['sentence']}{KEPT.get(found.get('kept'), '')}"
        for seed, found in held.items()
    ]
    added = {s: found["added"]["fixed"]["value"] for s, found in held.items() if "fixed" in found}
    if len(added) > 1:
        mean, spread = statistics.fmean(added.values()), statistics.stdev(added.values())
        values = f"{'-' * (mean < 0)}{points(measure, mean)} ± {points(measure, spread)}"
        lines.append(
            f"over the best fixed experts of each seed, routing is {values}{unit(measure)} better "
            f"(mean and standard deviation of seeds {', '.join(map(str, added))})"
        )
    return lines
