"""The methods of a comparison: one record for each, with all that is particular to it.

What is trained, at which rates and after which other runs, the rows of the table and the folders
all follow from ``methods_of``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines import Noiseless, RandomGenerator, TaskGenerator, oracle
from ..fields import there_are
from ..hub.labels import numbered
from ..hub.router import looks_at_expert
from ..runs.build import kind_of_task
from ..runs.config import LANDMARKS
from ..training import Task
from . import runs
from .results import SeedResults
from .runs import Context
from .settings import PASSES, CompareSettings, names_of_experts

PATHWAY = "pathway"
OUTPUTS = "outputs"  # of a vote that is a mean of outputs, not of stored predictions

# Why methods cannot be held to a number of expert forwards.
SPENT = (
    "what learns from the experts trained alone begins when these have spent all that --budget "
    "passes allows"
)
NO_EXPERT = (
    "a network of kernels mixed from the experts' is none of them, and --budget passes counts "
    "passes of experts"
)


@dataclass(frozen=True)
class Method:
    """A method. It is a run of its own, or a vote over the runs that it needs.

    name: as ``--methods`` takes it. title: as tables show it.
    train: trains it and returns the model; None: a vote.
    run: the name of its run's folder; "" : the method's own name.
    needs: runs that it learns from or votes with; their training counts as its own.
    tuned: trained at every rate. follows: else, the run whose chosen rate it is trained at; None:
        it trains nothing.
    forwards: expert forwards for each sample of a training step.
    length: of its training, as a multiple of the settings' steps.
    barred: why it cannot be held to the comparison's budget; "": it can.
    members: of a vote, which experts are asked, by number. decide: what their predictions [S, N, P]
        on N targets are worth, a score [N] of the task's metric.
    together: of a run that trains nothing, but asks the fine-tuned experts of others together: what
        a vote is where the stored predictions are too little to vote with.
    k: K of a Hub-Pathway as the paper has it; None for all others.
    equal: only for experts of equal architecture. bound: no method can reach it by choosing on
        other data, so it does not compete. paper: its key in ``paper_numbers``.
    full: of an expert alone, its name with the expert's in full, as earlier versions had it;
        ``--methods`` takes that, too.
    """

    name: str
    title: str
    train: Callable[[Context], nn.Module] | None = None
    run: str = ""
    needs: tuple[str, ...] = ()
    tuned: bool = False
    follows: str | None = None
    forwards: int = 0
    length: Fraction = Fraction(1)
    barred: str = ""
    members: Callable[[SeedResults], Sequence[int]] | None = None
    decide: Callable[[Task, Tensor, Any], Tensor] | None = None
    together: bool = False
    k: int | None = None
    equal: bool = False
    bound: bool = False
    paper: str = ""
    full: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", "" if self.train is None else self.run or self.name)

    @property
    def waits_for(self) -> tuple[str, ...]:
        """All runs that must be finished before."""
        return self.needs if self.follows is None else (*self.needs, self.follows)

    def asked(self, results: SeedResults) -> list[str]:
        """The runs whose models are asked at inference."""
        return [self.run] if self.train else [f"single-{i}" for i in self.members(results)]

    def scores(self, results: SeedResults) -> Tensor:
        """[N]: the task's metric on each test sample."""
        task, targets = results.task, results.targets()["test"]
        predictions = [results.predictions(run)["test"] for run in self.asked(results)]
        if self.train is not None:
            return task.scores(predictions[0], targets)
        return self.decide(task, torch.stack(predictions), targets)


def by_vote(name: str) -> Callable[[Task, Tensor, Any], Tensor]:
    return lambda task, predictions, targets: task.scores(task.votes[name](predictions), targets)


def everyone(results: SeedResults) -> list[int]:
    return list(range(len(results.problem["experts"])))


def in_hindsight(results: SeedResults) -> list[int]:
    name = results.task.metric.name
    tested = [results.result(f"single-{i}")["test"][name] for i in everyone(results)]
    return results.task.metric.ranked(tested)[:1]


def of_best(count: int) -> Callable[[SeedResults], list[int]]:
    return lambda results: results.best_singles()[:count]


def floors(kind: type[Task]) -> list[Method]:
    """What shows how much of a figure is owed to anything learned, and to pre-training: table 3 of
    the paper begins with a network from scratch."""
    if kind.name != LANDMARKS:
        return []
    return [
        Method("mean-shape", "mean shape", runs.mean_shape),
        Method(
            "from-scratch", "from scratch", runs.from_scratch, tuned=True, forwards=1,
            paper="FromScratch",
        ),
    ]  # fmt: skip


def pathway_forwards(settings: CompareSettings, k: int, routed: bool = True) -> int:
    """Expert forwards for each sample of a Hub-Pathway's training step. routed: its generator is
    the one that the settings describe.

    A router that looks at an expert runs it on every sample: one more, though without a backward
    pass. A frozen network of the router's own is no expert: FLOPs and time have its cost.
    """
    return k + (routed and looks_at_expert(settings.fit.router))


def methods_of(settings: CompareSettings) -> list[Method]:
    """All methods for a comparison's hub and task, in the order of the table."""
    experts, k = names_of_experts(settings), settings.fit.k
    count, in_full = len(experts), numbered(settings.fit.hub)
    spent, no_expert = (SPENT, NO_EXPERT) if settings.budget == PASSES else ("", "")
    singles = tuple(f"single-{i}" for i in range(count))
    alone = [
        Method(
            f"single:{name}", f"single: {name}", lambda c, i=i: runs.single(c, i), singles[i],
            tuned=True, forwards=1, paper=singles[i], full=f"single:{in_full[i]}",
        )
        for i, name in enumerate(experts)
    ]  # fmt: skip

    kind = kind_of_task(settings.fit)
    # Of stored predictions nobody can make the outputs again that an ensemble is the mean of.
    on_outputs = getattr(kind, "votes_on_outputs", False)
    together = OUTPUTS if on_outputs else "soft"
    titles = getattr(kind, "vote_titles", {})

    def said(vote: str) -> str:
        return titles.get(vote, f"{vote} vote")

    def vote(name, title, members, decide="soft", paper="", bound=False) -> Method:
        decide = by_vote(decide) if isinstance(decide, str) else decide
        return Method(
            name, title, needs=singles, forwards=count, members=members, decide=decide,
            paper=paper, bound=bound,
        )  # fmt: skip

    def ensemble(name, title, members, paper) -> Method:
        if not on_outputs:
            return vote(name, title, members, paper=paper)
        return Method(
            name, title, lambda c: runs.ensemble(c, members), needs=singles, forwards=count,
            together=True, paper=paper,
        )  # fmt: skip

    def pathway(name, title, train, active=k, routed=True, **more) -> Method:
        forwards = pathway_forwards(settings, active, routed)
        length = settings.length(forwards)
        return Method(name, title, train, forwards=forwards, length=length, **more)

    def variant(name, title, train, paper="", routed=True) -> Method:
        return pathway(name, title, train, routed=routed, follows=PATHWAY, paper=paper)

    def soup(name, title, greedy, paper="") -> Method:
        return Method(
            name, title, lambda c: runs.soup(c, greedy), needs=singles, barred=spent, equal=True,
            paper=paper,
        )  # fmt: skip

    def zoo(name, title, lite, paper) -> Method:
        return Method(
            name, title, lambda c: runs.zoo_tuning(c, lite), tuned=True, forwards=1,
            barred=no_expert, equal=True, paper=paper,
        )  # fmt: skip

    return [
        *floors(kind),
        *alone,
        vote("best-single", "best single", of_best(1), paper="BestSingle"),
        vote("best-single-in-hindsight", "best single, in hindsight", in_hindsight, bound=True),
        ensemble("ensemble-top-k", f"ensemble of the best {k}", of_best(k), "EnsembleTopK"),
        ensemble("ensemble", f"ensemble, {said(together)}", everyone, "Ensemble"),
        *(
            vote(f"ensemble-{name}", f"ensemble, {said(name)}", everyone, name)
            for name in kind.votes
            if name != "soft" or on_outputs
        ),
        Method(
            "distill", "distill", runs.distill, needs=singles, tuned=True, forwards=count + 1,
            barred=spent, paper="Distill",
        ),
        soup("soup-uniform", "model soup, uniform", greedy=False),
        soup("soup-greedy", "model soup, greedy", greedy=True, paper="ModelSoups"),
        # The student with its teachers, and as it was an update before.
        Method(
            "knowledge-flow", "Knowledge Flow", runs.knowledge_flow, needs=singles, tuned=True,
            forwards=count + 2, barred=spent, equal=True, paper="KFlow",
        ),
        zoo("zoo-tuning-lite", "Zoo-Tuning-Lite", True, "ZooTuningL"),
        zoo("zoo-tuning", "Zoo-Tuning", False, "ZooTuning"),
        pathway(
            "hub-pathway", "Hub-Pathway", runs.pathway, run=PATHWAY, tuned=True, k=k,
            paper="HubPathway",
        ),
        variant(
            "random-pathway", "Hub-Pathway, random pathway",
            lambda c: runs.pathway(c, generator=lambda m: RandomGenerator(len(m.experts), m.k)),
            "RandomPath", routed=False,
        ),
        variant(
            "without-explore", "Hub-Pathway, without explore",
            lambda c: runs.pathway(c, explore=False), "WithoutExplore",
        ),
        variant(
            "without-exploit", "Hub-Pathway, without exploit",
            lambda c: runs.pathway(c, exploit=False), "WithoutExploit",
        ),
        variant(
            "task-pathway", "Hub-Pathway, one route for all",
            lambda c: runs.pathway(c, generator=lambda m: TaskGenerator(len(m.experts))),
            routed=False,
        ),
        variant(
            "noise-off", "Hub-Pathway, noise off",
            lambda c: runs.pathway(c, generator=lambda m: Noiseless(m.generator)),
        ),
        *(
            pathway(
                f"hub-pathway-k{n}", f"Hub-Pathway, K = {n}", lambda c, n=n: runs.pathway(c, n),
                n, run=f"pathway-k{n}", follows=PATHWAY, k=n,
            )
            for n in range(1, count + 1)
            if n != k
        ),
        vote("oracle", "oracle", everyone, oracle, "Oracle", bound=True),
    ]  # fmt: skip


GROUPS = {"single": "single:", "k-sweep": "hub-pathway-k"}


def choose_methods(text: str, methods: Sequence[Method]) -> list[Method]:
    """The methods that a list of names means, in the table's order: "all", or names apart by
    commas; "single" is every expert alone, "k-sweep" Hub-Pathway with every other K.

    Raises ValueError for unknown names, with the closest, and for methods that are barred.
    """
    names = _split_names(text, {_plain(name) for m in methods for name in (m.name, m.full)})
    if not names:
        raise ValueError("methods: expected names, comma-separated, or all; got none")
    if "all" in names:
        return list(methods)  # rows of the barred say why they have no figure
    wanted: set[str] = set()
    for name in names:
        of_group = [m.name for m in methods if name in GROUPS and m.name.startswith(GROUPS[name])]
        exact = [m.name for m in methods if name in (_plain(m.name), _plain(m.full))]
        if not of_group and not exact:
            several = [m.name for m in methods if not m.name.startswith("single:")]
            allowed = ["all", *GROUPS, *several]
            raise ValueError(f"methods: {name!r} is unknown; {there_are(allowed, name)}")
        wanted.update(of_group or exact)
    chosen = [method for method in methods if method.name in wanted]
    _refuse_barred(chosen)
    return chosen


def _refuse_barred(methods: Sequence[Method]) -> None:
    """Raises ValueError if there are some that cannot be held to the budget."""
    names: dict[str, list[str]] = {}
    for method in methods:
        if method.barred:
            names.setdefault(method.barred, []).append(method.name)
    if names:
        said = "; ".join(f"{', '.join(n)} cannot take part: {why}" for why, n in names.items())
        raise ValueError(f"methods: {said}; leave out what cannot, or use --budget steps")


def _split_names(text: str, known: Collection[str]) -> list[str]:
    """The names of a list, plain; of an expert alone one may hold commas, as paths do."""
    parts = [_plain(part) for part in text.split(",") if part.strip()]
    names: list[str] = []
    while parts:
        runs = (",".join(parts[:count]) for count in range(len(parts), 1, -1))
        names.append(next((name for name in runs if name in known), parts[0]))
        parts = parts[names[-1].count(",") + 1 :]
    return names


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
