"""The methods of a comparison by name: which runs each needs, and what its row says of a seed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..baselines import oracle
from ..tasks import Classification
from .results import SeedResults

TASK = Classification(())
COSTS = ("forwards_per_sample", "gflops_per_sample", "milliseconds_per_sample")

RunNames = Callable[[int, int], list[str]]  # of (M, K)


@dataclass(frozen=True)
class Entry:
    """A method on one seed: accuracy on the test split and what it cost."""

    accuracy: float
    train_seconds: float
    costs: dict[str, float | None]
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Method:
    """name: as ``--methods`` takes it. title: as tables show it. runs: what it needs of a hub.
    entry: what came of it. equal: only for experts of equal architecture. bound: no method can
    reach it by choosing on other data, so it does not compete. paper: its key in the paper's
    tables."""

    name: str
    title: str
    runs: RunNames
    entry: Callable[[SeedResults], Entry]
    equal: bool = False
    bound: bool = False
    paper: tuple[str, ...] = ()


def all_singles(experts: int, _k: int) -> list[str]:
    return [f"single-{i}" for i in range(experts)]


def trained(run: str, needs_singles: bool = False) -> Callable[[SeedResults], Entry]:
    """The entry of a method that is a single run; its training counts that of the singles it
    learned from."""

    def entry(results: SeedResults) -> Entry:
        result = results.result(run)
        seconds = result["train_seconds"]
        if needs_singles:
            seconds += sum(s["train_seconds"] for s in _singles(results))
        costs = {name: result[name] for name in COSTS}
        costs["peak_memory_mb"] = result["peak_memory_mb"]
        costs["train_forwards_per_sample"] = result["train_forwards_per_sample"]
        return Entry(result["test"]["accuracy"], seconds, costs, (result["rate"],))

    return entry


def vote(
    choose: Callable[[SeedResults], Sequence[int]],
    decide: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[SeedResults], Entry]:
    """The entry of a vote. choose: whose votes count. decide: test probabilities [S, n, C] of those
    and targets [n] -> [n], 1 where the vote is right. All singles were trained for it, and
    each member is asked at inference, one after another."""

    def entry(results: SeedResults) -> Entry:
        members = choose(results)
        asked = [results.result(f"single-{i}") for i in members]
        probabilities = torch.stack([results.scores(f"single-{i}")["test"] for i in members])
        right = decide(probabilities, results.targets()["test"])
        everyone = _singles(results)
        costs = {name: _sum(result[name] for result in asked) for name in COSTS}
        costs["peak_memory_mb"] = max(
            (r["peak_memory_mb"] for r in everyone if r["peak_memory_mb"] is not None), default=None
        )
        costs["train_forwards_per_sample"] = len(everyone)
        return Entry(
            right.double().mean().item(),
            sum(result["train_seconds"] for result in everyone),
            costs,
            tuple(result["rate"] for result in asked),
        )

    return entry


def everyone(results: SeedResults) -> list[int]:
    return list(range(len(results.problem["experts"])))


def in_hindsight(results: SeedResults) -> list[int]:
    tested = [r["test"]["accuracy"] for r in _singles(results)]
    return [max(range(len(tested)), key=tested.__getitem__)]


def of_best(count: int) -> Callable[[SeedResults], list[int]]:
    return lambda results: results.best_singles()[:count]


def soft(probabilities: Tensor, targets: Tensor) -> Tensor:
    return TASK.scores(TASK.votes["soft"](probabilities), targets)


def hard(probabilities: Tensor, targets: Tensor) -> Tensor:
    return TASK.scores(TASK.votes["hard"](probabilities), targets)


def _singles(results: SeedResults) -> list[dict[str, Any]]:
    return [results.result(f"single-{i}") for i in everyone(results)]


def _sum(values) -> float | None:
    known = list(values)
    return None if None in known else sum(known)


def methods_of(experts: Sequence[str], k: int) -> list[Method]:
    """All methods for a hub, in the order of the table. experts: names of the M experts."""
    found = [
        Method(
            f"single:{name}", f"single: {name}",
            lambda m, _k, i=i: [f"single-{i}"], trained(f"single-{i}"),
        )
        for i, name in enumerate(experts)
    ]  # fmt: skip
    found += [
        Method(
            "best-single", "best single", all_singles,
            vote(of_best(1), soft), paper=("BestSingle",),
        ),
        Method(
            "best-single-in-hindsight", "best single, in hindsight", all_singles,
            vote(in_hindsight, soft), bound=True,
        ),
        Method(
            "ensemble-top-k", f"ensemble of the best {k}", all_singles, vote(of_best(k), soft),
            paper=("EnsembleTopK",),
        ),
        Method(
            "ensemble", "ensemble, soft vote", all_singles,
            vote(everyone, soft), paper=("Ensemble",),
        ),
        Method("ensemble-hard", "ensemble, hard vote", all_singles, vote(everyone, hard)),
        _trained("distill", "distill", ("Distill",), singles=True),
        _trained("soup-uniform", "model soup, uniform", (), singles=True, equal=True),
        _trained("soup-greedy", "model soup, greedy", ("ModelSoups",), singles=True, equal=True),
        _trained("knowledge-flow", "Knowledge Flow", ("KFlow",), singles=True, equal=True),
        _trained("zoo-tuning-lite", "Zoo-Tuning-Lite", ("ZooTuningL",), equal=True),
        _trained("zoo-tuning", "Zoo-Tuning", ("ZooTuning",), equal=True),
        _trained("hub-pathway", "Hub-Pathway", ("HubPathway",), run="pathway"),
        _trained("random-pathway", "Hub-Pathway, random pathway", ("RandomPath",)),
        _trained("without-explore", "Hub-Pathway, without explore", ("WithoutExplore",)),
        _trained("without-exploit", "Hub-Pathway, without exploit", ("WithoutExploit",)),
        _trained("task-pathway", "Hub-Pathway, one route for all"),
        _trained("noise-off", "Hub-Pathway, noise off"),
    ]  # fmt: skip
    found += [
        _trained(f"hub-pathway-k{n}", f"Hub-Pathway, K = {n}", run=f"pathway-k{n}")
        for n in range(1, len(experts) + 1)
        if n != k
    ]
    best = vote(everyone, partial(oracle, TASK))
    return [*found, Method("oracle", "oracle", all_singles, best, bound=True, paper=("Oracle",))]


def _trained(
    name: str,
    title: str,
    paper: tuple[str, ...] = (),
    run: str | None = None,
    singles: bool = False,
    equal: bool = False,
) -> Method:
    run = run or name
    needed = ["pathway", run] if run not in ("pathway",) and _is_variant(run) else [run]
    return Method(
        name, title,
        lambda m, k: [*(all_singles(m, k) if singles else ()), *needed],
        trained(run, singles), equal, paper=paper,
    )  # fmt: skip


def _is_variant(run: str) -> bool:
    rivals = ("distill", "soup", "knowledge", "zoo")
    return not run.startswith(rivals)


GROUPS = {"single": "single:", "k-sweep": "hub-pathway-k"}


def choose_methods(text: str, experts: Sequence[str], k: int) -> list[Method]:
    """The methods that a list of names means, in the table's order: "all", or names apart by
    commas; "single" is every expert alone, "k-sweep" Hub-Pathway with every other K.

    Raises ValueError for unknown names, with the closest.
    """
    known = methods_of(experts, k)
    names = [_plain(part) for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError("methods: expected names apart by commas, or all; got none")
    if "all" in names:
        return known
    wanted: set[str] = set()
    for name in names:
        of_group = [m.name for m in known if name in GROUPS and m.name.startswith(GROUPS[name])]
        exact = [m.name for m in known if _plain(m.name) == name]
        if not of_group and not exact:
            allowed = ["all", *GROUPS, *(m.name for m in known if not m.name.startswith("single:"))]
            close = difflib.get_close_matches(name, allowed, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"methods: {name!r} is unknown; {hint}There are {', '.join(allowed)}")
        wanted.update(of_group or exact)
    return [method for method in known if method.name in wanted]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
