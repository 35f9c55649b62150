"""``hubpath budget``: what accuracy a trained hub has for how many milliseconds an image.

Each expert and the router are timed once, and asked once about every validation and test image.
Policies, single experts, ensembles and cascades are then computed from that (see ``runs.budget``):
chosen on validation images alone, and reported on the test images as they come out. Nothing is
trained.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..baselines.costs import wait
from ..devices import autocast, eval_mode
from ..executors.remembered import PREDICTIONS, device_name, hub_key
from ..files import write_bytes, write_json
from ..hub import expert_names
from ..measure import Measure
from ..model import FixedRoutes, HubPathway, RoutingPolicy
from ..runs.answers import ask
from ..runs.budget import SHARES, Cascade, Costs, Judge, Outcome, best_within, candidates
from ..runs.build import eval_batches
from ..runs.config import CLASSIFICATION
from ..runs.data import open_held_out
from ..runs.folder import Run, open_run

BUDGET = "budget.json"
PICTURES = ("budget.png", "budget.svg")
BATCH, ROUNDS = 64, 9  # images at a time for the costs, and how often they are timed
POINTS = 13  # budgets of a sweep, from the least to the most that an image can cost


@dataclass(frozen=True)
class Asked:
    """A run that was timed and asked. test: None where there are no test images of their own."""

    run: Run
    names: tuple[str, ...]
    costs: Costs
    validation: Judge
    test: Judge | None
    batch: int

    @property
    def device(self) -> str:
        return str(next(self.run.model.parameters()).device)


def budget(
    run: str | Path,
    device: str = "cpu",
    data_root: str | Path | None = None,
    batch_size: int = BATCH,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Sweeps the budgets of a run, and writes ``budget.json`` and the figure beside it.

    Args:
        run: the folder of a run of ``hubpath fit``.
        data_root: where its data lies now.
        batch_size: images at a time, for the times.
        tell: is told what is being done.

    Returns what ``budget.json`` holds; see docs/budget.md.

    Raises:
        ValueError: no run, one without validation images or with fixed routes, or data that is not
            what it was.
    """
    asked = ask_run(run, device, data_root, batch_size, tell)
    tell("trying policies")
    result = sweep(asked)
    folder = Path(run)
    write_json(folder / BUDGET, result)
    _write_pictures(folder, result, asked.run.task.metric)
    return result


def ask_run(
    run: str | Path,
    device: str = "cpu",
    data_root: str | Path | None = None,
    batch_size: int = BATCH,
    tell: Callable[[str], None] = lambda _: None,
    with_test: bool = True,
    budget_ms: float | None = None,
) -> Asked:
    """Opens a run, times its parts, and asks all of them about its images; where there is a budget
    that the cheapest expert exceeds, ValueError before any is asked."""
    opened = open_run(run, device, CLASSIFICATION)
    model, config, task = opened.model, opened.config, opened.task
    validation, test = open_held_out(opened, run, data_root, "a policy is chosen")
    batches = eval_batches(validation, config, opened.image_size, device=device)
    images = torch.cat([images for images, _ in _first(batches, batch_size)])[:batch_size]
    tell(f"timing the router and {len(model.experts)} experts on {len(images)} images at a time")
    costs = measure_costs(model, images.to(device), config.trainer.amp)
    names = expert_names(config.hub)
    if budget_ms is not None:
        costs.check(budget_ms, names)

    def judge(split: Any, name: str) -> Judge:
        tell(f"asking every expert about {len(split)} {name} images")
        own = eval_batches(split, config, opened.image_size, device=device)
        return Judge(ask(model, own, device, config.trainer.amp), task, costs)

    return Asked(
        opened,
        names,
        costs,
        judge(validation, "validation"),
        judge(test, "test") if with_test and test is not None else None,
        len(images),
    )


@torch.no_grad()
def measure_costs(model: HubPathway, images: Tensor, amp: str = "none") -> Costs:
    """Milliseconds an image of the router, and of each expert with all that goes with it: rows
    gathered, normalised, run and aggregated. In a hub an expert gets N*K/M rows of N images in the
    mean, and few rows cost more each: it is timed on as many, and on N for what it costs alone.
    Medians of rounds in which all of them run; experts of the same architecture share one, or their
    order would be chance's.

    images: [N, ...], on the model's device; the costs are those of N images at a time.
    """
    count, size, device = len(model.experts), len(images), images.device
    sizes = (math.ceil(size * model.k / count), size)
    calls: dict[tuple[int, int], Callable[[], object]] = {(-1, size): lambda: model.scores(images)}
    for i in range(count):
        for rows in sizes:
            own = images[:rows]
            routing = FixedRoutes([i], [1.0], count).routing(own)
            calls[i, rows] = lambda own=own, routing=routing: model(own, routing=routing)
    times: dict[tuple[int, int], list[float]] = {key: [] for key in calls}
    with eval_mode(model), autocast(device, amp):
        for round_ in range(1 + ROUNDS):  # the first prepares what later ones reuse
            for key, call in calls.items():
                wait(device)
                began = time.perf_counter()
                call()
                wait(device)
                if round_:
                    times[key].append(1e3 * (time.perf_counter() - began) / key[1])
    alike = [hub_key([expert], PREDICTIONS) for expert in model.experts]
    same = [[j for j in range(count) if alike[j] == key] for key in alike]
    in_hub, alone = (
        tuple(statistics.median([t for j in own for t in times[j, rows]]) for own in same)
        for rows in sizes
    )
    return Costs(statistics.median(times[-1, size]), in_hub, alone)


def sweep(asked: Asked) -> dict[str, Any]:
    """What ``budget.json`` holds."""
    validation, metric, k = asked.validation, asked.run.task.metric, asked.run.model.k
    costs, count = asked.costs, len(asked.names)
    budgets = torch.linspace(costs.cheapest, costs.full(k), POINTS).double().tolist()
    budgets = [costs.cheapest, *budgets[1:-1], costs.full(k)]
    found = candidates(validation, budgets)

    def both(outcome: Callable[[Judge], Outcome]) -> dict[str, Any]:
        splits = {"validation": validation, "test": asked.test}
        return {n: None if j is None else asdict(outcome(j)) for n, j in splits.items()}

    def of(policy: RoutingPolicy) -> dict[str, Any]:
        return {"policy": policy.to_dict(), **both(lambda judge: judge.policy(policy))}

    alone = [validation.ensemble([i]) for i in range(count)]
    ranked = metric.ranked([outcome.value for outcome in alone])
    cheapest = sorted(ranked, key=lambda i: costs.alone[i])
    cascades = {
        name: Cascade(judge, cheapest)
        for name, judge in (("validation", validation), ("test", asked.test))
        if judge is not None
    }
    curve, rivals = [], []
    for most in budgets:
        best = best_within(found, most, metric)
        if best is not None:  # the cheapest expert alone keeps within each
            curve.append({"budget": most, "mu": best.mu, **of(best.policy)})
        threshold = cascades["validation"].threshold(most)
        if threshold is not None:
            outcomes = {n: asdict(cascade.at(threshold)) for n, cascade in cascades.items()}
            rivals.append({"budget": most, "threshold": threshold, "test": None, **outcomes})
    result = {
        "device": asked.device,
        "hardware": device_name(torch.device(asked.device)),
        "batch": asked.batch,
        "metric": metric.name,
        "k": k,
        "weights": weights_hash(asked.run.model),
        "experts": list(asked.names),
        "milliseconds": asdict(costs),
        "images": {
            name: None if judge is None else len(judge.answers.targets)
            for name, judge in (("validation", validation), ("test", asked.test))
        },
        "hub": both(lambda judge: judge.policy(RoutingPolicy())),
        "curve": curve,
        "top_mass": [of(RoutingPolicy(share)) for share in SHARES],
        "singles": [
            {"name": asked.names[i], **both(lambda judge, i=i: judge.ensemble([i]))}
            for i in range(count)
        ],
        "ensembles": [
            {
                "experts": [asked.names[i] for i in ranked[:m]],
                **both(lambda judge, m=m: judge.ensemble(ranked[:m])),
            }
            for m in range(1, count + 1)
        ],
        "cascade_order": [asked.names[i] for i in cheapest],
        "cascades": rivals,
    }
    return {**result, "singles_above": singles_above(result, metric)}


def singles_above(result: Mapping[str, Any], measure: Measure) -> list[dict[str, Any]]:
    """Where a single expert is better than the curve on validation images: the budget, the expert,
    and whether it costs more than the hub does there."""
    return [
        {
            "budget": point["budget"],
            "name": single["name"],
            "costs_more": single["validation"]["milliseconds"]
            > point["validation"]["milliseconds"],
        }
        for point in result["curve"]
        for single in result["singles"]
        if measure.is_better(single["validation"]["value"], point["validation"]["value"])
    ]


def weights_hash(model: HubPathway) -> str:
    """SHA-256 of the names and bytes of all that a model has learned."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def check_asked(budget_ms: float | None, top_mass: float | None) -> None:
    """Raises ValueError for a budget or a share that suits no run, and for both."""
    if budget_ms is not None and top_mass is not None:
        raise ValueError(
            "budget-ms and top-mass: give one of them; the policy of a budget has a share of its "
            "own"
        )
    if budget_ms is not None and not 0 < budget_ms < math.inf:
        raise ValueError(
            f"budget-ms: expected a finite number of milliseconds above 0, got {budget_ms:g}"
        )
    RoutingPolicy(top_mass)


def follow(
    run: str | Path,
    model: HubPathway,
    budget_ms: float | None = None,
    top_mass: float | None = None,
    data_root: str | Path | None = None,
) -> None:
    """Gives an opened run's model the policy that is asked for; with neither it keeps its own."""
    policy = policy_for(run, model, budget_ms, top_mass, data_root)
    if policy is not None:
        model.policy = policy


def policy_for(
    run: str | Path,
    model: HubPathway,
    budget_ms: float | None = None,
    top_mass: float | None = None,
    data_root: str | Path | None = None,
) -> RoutingPolicy | None:
    """What ``--budget-ms`` or ``--top-mass`` asks for; None: neither is given.

    A budget takes the policy of the largest budget of ``budget.json`` that is not above it; where
    the run has no such file, it is measured now, on validation images, for this budget alone;
    ``data_root`` is where they lie now.

    Raises:
        ValueError: both are given; a budget that the cheapest expert exceeds; a ``budget.json`` of
            another device or another model.
    """
    check_asked(budget_ms, top_mass)
    if top_mass is not None:
        return RoutingPolicy(top_mass)
    if budget_ms is None:
        return None
    device, path = next(model.parameters()).device, Path(run) / BUDGET
    if not path.is_file():
        asked = ask_run(run, str(device), data_root, with_test=False, budget_ms=budget_ms)
        found = candidates(asked.validation, [budget_ms])
        return best_within(found, budget_ms, asked.run.task.metric).policy
    held = _read(path)
    if held.device != device.type:
        raise ValueError(
            f"device: {path} has the times of {held.device}, got {device.type}; measure there by "
            f"`hubpath budget {run} --device {device.type}`"
        )
    if held.k != model.k or held.weights != weights_hash(model):
        raise ValueError(
            f"{path} was measured of another model than the run has now; measure again by "
            f"`hubpath budget {run}`"
        )
    held.costs.check(budget_ms, held.names)
    policy = [policy for most, policy in held.curve if most <= budget_ms][-1]
    policy.check(model.k, len(model.experts))
    return policy


@dataclass(frozen=True)
class _Held:
    """Of a ``budget.json``. device: its kind. curve: (budget, policy), ascending, the first budget
    no larger than the least that an image can cost."""

    costs: Costs
    names: Sequence[str]
    device: str
    k: int
    weights: str
    curve: list[tuple[float, RoutingPolicy]]


def _read(path: Path) -> _Held:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        times, names, k, weights = (
            held[key] for key in ("milliseconds", "experts", "k", "weights")
        )
        costs = Costs(float(times["router"]), tuple(map(float, times["experts"])))
        curve = [
            (float(point["budget"]), RoutingPolicy.from_dict(point["policy"]))
            for point in held["curve"]
        ]
        curve.sort(key=lambda point: point[0])
        if not costs.experts or len(names) != len(costs.experts):
            raise ValueError("it has no times, or not as many names")
        if not curve or not curve[0][0] <= costs.cheapest:
            raise ValueError("its curve does not begin at the cheapest expert")
        return _Held(costs, names, held["device"].split(":")[0], k, weights, curve)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or measure again") from error


def _first(batches: Any, count: int) -> Any:
    """Batches until there are ``count`` images."""
    seen = 0
    for images, targets in batches:
        yield images, targets
        seen += len(images)
        if seen >= count:
            return


def _write_pictures(folder: Path, result: Mapping[str, Any], measure: Measure) -> None:
    from ..report.figures.budget import accuracy_under_a_budget
    from ..report.style import png, svg

    figure = accuracy_under_a_budget(result, measure)
    for name, draw in zip(PICTURES, (png, svg), strict=True):
        write_bytes(folder / name, draw(figure))
