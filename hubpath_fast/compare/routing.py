"""Does routing pay? What Hub-Pathway's own run of a comparison found out, and its sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure import Measure
from ..model import HubPathway
from ..report.sections import initial
from ..runs.build import kind_of_task
from ..runs.measure import predict
from ..runs.pays import does_routing_pay, fixed_routes
from ..runs.pays_words import routing_of_seeds
from ..training import evaluate
from .methods import PATHWAY
from .problems import Problem
from .results import RunFailed, SeedResults
from .settings import CompareSettings


def judge_routing(model: HubPathway, problem: Problem) -> dict[str, Any]:
    """{"routes", "routing"}: where the test images are sent, and what ``does_routing_pay`` says of
    the validation images. For information "routing" has under "test" the metric of the learned
    routes and of the fixed set, which was chosen without these images."""
    task, trainer = problem.task, problem.fit.trainer
    on = trainer.device, trainer.amp
    scores = evaluate(model, problem.batches("test"), task, *on)
    names, seed = problem.expert_names, trainer.seed
    found = does_routing_pay(model, task, problem.batches("validation"), names, seed, *on)
    name = task.metric.name
    found["test"] = {"learned": scores[name]}
    if "fixed" in found:
        learned, model.generator = model.generator, fixed_routes(found)
        predictions, _ = predict(model, task, problem.batches("test"), *on)
        model.generator = learned
        fixed = task.scores(predictions, problem.targets["test"]).mean().item()
        found["test"]["fixed"] = fixed
    return {"routes": scores["routes"], "routing": found}


def routing_notes(
    settings: CompareSettings, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], out: Path
) -> list[str]:
    """Sentences for the table's page: of each seed, and of all together. None where Hub-Pathway was
    not compared, or by a version that did not look."""
    if not any(row["method"] == "hub-pathway" and row["seeds"] for row in rows):
        return []
    results = {}
    for seed in seeds:
        try:
            result = SeedResults(out, seed, settings.rates).result(PATHWAY)
        except RunFailed:
            continue
        if result.get("routing"):
            results[seed] = result
    measure = kind_of_task(settings.fit).metric
    lines = routing_of_seeds(list(results), list(results.values()), measure)
    found = [result["routing"] for result in results.values()]
    lines = [f"{initial(line)}." for line in lines]
    split = SeedResults(out, seeds[0], settings.rates).split
    more = _test(found, measure, split), _quality(found, measure)
    return lines + [line for line in more if line]


def _test(found: Sequence[Mapping[str, Any]], measure: Measure, split: str) -> str:
    """For information: of test images, on which nothing was chosen."""
    if split != "test":
        return ""
    pairs = [f["test"] for f in found if "fixed" in f["test"]]
    if not pairs:
        return ""
    learned, fixed = (statistics.fmean(p[k] for p in pairs) for k in ("learned", "fixed"))
    return (
        f"On the test images the learned routes have {measure.title} {measure.text(learned)}, the "
        f"fixed experts that validation chose {measure.text(fixed)}{_means(pairs)}."
    )


def _quality(found: Sequence[Mapping[str, Any]], measure: Measure) -> str:
    pairs = [f["quality"] for f in found if f["quality"]["counted"]]
    if not pairs:
        return ""
    top, random = (statistics.fmean(p[k] for p in pairs) for k in ("top", "random"))
    return (
        "On validation images on which some expert does not fail, the most trusted one has "
        f"{measure.title} {measure.text(top)}, a random one {measure.text(random)}{_means(pairs)}."
    )


def _means(pairs: Sequence[Any]) -> str:
    return " (means over the seeds)" if len(pairs) > 1 else ""
