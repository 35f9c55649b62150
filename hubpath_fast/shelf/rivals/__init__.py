"""What a routed hub is held against: other ways to use the same heads on the same features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .nearest import knn_router
from .problem import Answer, CannotRun, Look, Problem, costs, score
from .stacking import stacked
from .static import best_single, oracle, random_sets, static_best, uniform

if TYPE_CHECKING:
    from ..run import ShelfHub

__all__ = [
    "Answer", "CannotRun", "Look", "Problem", "Rival", "costs", "every_rival", "score",
]  # fmt: skip

HUB = "hub"
DYNAMIC = {"knora_e": "KNORA-E", "meta_des": "META-DES"}
INSTALL = 'needs DESlib: pip install "hubpath_fast[shelf]"'


@dataclass(frozen=True)
class Rival:
    """name: short, of its row. title: for readers. answer: raises CannotRun. bound: it knows the
    targets, so it does not compete."""

    name: str
    title: str
    answer: Callable[[], Answer]
    bound: bool = False


def every_rival(problem: Problem, hub: ShelfHub | None = None) -> list[Rival]:
    """In the order of their rows. hub: None: there is none yet, which its row says."""
    k = problem.k
    routers = [
        functools.cache(functools.partial(knn_router, problem, look)) for look in problem.looks
    ]
    title = "routed hub" if hub is None else f"routed hub, K = {hub.model.k}"
    return [
        Rival("single", "best single model", lambda: best_single(problem)),
        Rival("static", f"static best {k}", lambda: static_best(problem)),
        Rival("random", f"random {k}", lambda: random_sets(problem)),
        Rival("uniform", "mean of all", lambda: uniform(problem)),
        Rival("stacked", "stack of all", lambda: stacked(problem)),
        *(
            Rival("knn_" + look.kind, f"kNN router on {look.kind}", router)
            for look, router in zip(problem.looks, routers, strict=True)
        ),
        *(
            Rival(name, title, functools.partial(_dynamic, problem, name, routers))
            for name, title in DYNAMIC.items()
        ),
        Rival(HUB, title, lambda: _routed(problem, hub)),
        Rival("oracle", "oracle", lambda: oracle(problem), bound=True),
    ]


def _dynamic(problem: Problem, name: str, routers: Sequence[Callable[[], Answer]]) -> Answer:
    """In the look by which a kNN router loses the least on the validation images."""
    try:
        from .dynamic import dynamic
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "deslib":
            raise
        raise CannotRun(INSTALL) from error
    targets = problem.targets["validation"]
    losses = [score(router().probabilities["validation"], targets)["loss"] for router in routers]
    return dynamic(problem, name, problem.looks[losses.index(min(losses))])


def _routed(problem: Problem, hub: ShelfHub | None) -> Answer:
    if hub is None:
        raise CannotRun("there is none yet: hubpath shelf fit SHELF makes one")
    from .routed import routed

    return routed(problem, hub)
