"""A router without training: the models that did best on the nearest known images.

Known are the validation images, and of the training images what heads say that were fitted without
them (out of fold), where that is given. Cosine similarity over what a router looks at, less its
mean. An image goes to the K models whose heads have the least mean loss on its nearest known
images, l_m; their probabilities are averaged by the likelihoods exp(-l_m). How many neighbours
there are, and among which models it chooses, is what loses the least on the validation images, each
without itself; the fewer of 200 models may be chosen, the less luck decides on a few neighbours.

Letters: n known images, q of them asked about, M models, F numbers of a look.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .problem import Answer, CannotRun, Look, Problem, score
from .static import greedy_order

NEIGHBOURS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 100)
POOLS = (8, 16, 32, 64)  # models to choose among, beside all of them
AT_ONCE = 1024  # images, whose similarities to all known images are held at a time


class Neighbours:
    """The known images by their similarity to others, the nearest first.

    seen: [n, F], of the known images.
    """

    def __init__(self, seen: Tensor):
        self.mean = seen.mean(0)
        self.seen = normalize(seen - self.mean, dim=1)

    def of(self, vectors: Tensor, themselves: bool = False) -> Tensor:
        """The ``NEIGHBOURS[-1]`` nearest, int64 [q, ...], or all but one, if they are fewer.

        vectors: [q, F]. themselves: they are the first q known images, and none is a neighbour of
        its own.
        """
        near = []
        for first in range(0, len(vectors), AT_ONCE):
            part = vectors[first : first + AT_ONCE]
            similar = normalize(part - self.mean, dim=1) @ self.seen.T
            if themselves:
                rows = torch.arange(len(part))
                similar[rows, first + rows] = -torch.inf
            near.append(similar.topk(min(NEIGHBOURS[-1], len(self.seen) - 1), dim=1).indices)
        return torch.cat(near)


def knn_router(problem: Problem, look: Look) -> Answer:
    """Raises CannotRun for a single known image."""
    losses, seen = problem.losses("validation"), look.vectors["validation"]
    if problem.train_losses is not None:
        losses = torch.cat([losses, problem.train_losses])
        seen = torch.cat([seen, look.vectors["train"]])
    targets = problem.targets["validation"]
    if len(losses) < 2:
        raise CannotRun("one validation image has no neighbours")
    known = Neighbours(seen)
    within = known.of(look.vectors["validation"], themselves=True)
    best = None
    for pool in pools(problem):
        for count in sorted({min(count, within.shape[1]) for count in NEIGHBOURS}):
            routing = route(losses, within, count, pool, problem.k)
            found = _mix(problem.log_probs["validation"], *routing)
            loss = score(found, targets)["loss"]
            if best is None or loss < best[0]:
                best = loss, count, pool, found, routing
    _, count, pool, found, routing = best
    probabilities = {"validation": found}
    if problem.split == "test":
        routing = route(losses, known.of(look.vectors["test"]), count, pool, problem.k)
        probabilities["test"] = _mix(problem.log_probs["test"], *routing)
    models = len(problem.labels)
    asked = torch.zeros(len(routing[0]), models).scatter(1, routing[0], 1.0)
    kept = torch.zeros(models)
    kept[list(pool)] = 1.0
    if look.model is not None:
        asked[:, look.model] = kept[look.model] = 1.0
    chosen = {"look": look.title, "neighbours": count, "models": len(pool)}
    return Answer(probabilities, asked, kept, chosen)


def pools(problem: Problem) -> list[Sequence[int]]:
    """Sets of models that know different images, each within the next; the last is all of them."""
    count = len(problem.labels)
    sizes = [size for size in POOLS if problem.k <= size < count]
    every = [range(count)]
    if not sizes:
        return every
    logits, targets = problem.log_probs["validation"], problem.targets["validation"]
    order = greedy_order(logits, targets, max(sizes), "routing")
    return [sorted(order[:size]) for size in sizes] + every


def route(
    losses: Tensor, near: Tensor, count: int, pool: Sequence[int], k: int
) -> tuple[Tensor, Tensor]:
    """The K models of each image, int64 [q, K], and their weights, which sum to 1.

    losses: [n, M]. near: [q, ...], known images, the nearest first. count: of neighbours.
    """
    among = torch.as_tensor(list(pool))
    chosen, weights = [], []
    for part in near[:, :count].split(AT_ONCE):
        mean = torch.zeros(len(part), len(losses)).scatter_(1, part, 1 / count)
        values, members = (mean @ losses[:, among]).topk(k, dim=1, largest=False)
        chosen.append(among[members])
        weights.append((-values).softmax(1))
    return torch.cat(chosen), torch.cat(weights)


def _mix(log_probs: Tensor, members: Tensor, weights: Tensor) -> Tensor:
    """[q, C]: probabilities of members [q, K], averaged by weights [q, K]."""
    of_members = log_probs[members, torch.arange(len(members))[:, None]].exp()  # [q, K, C]
    return (weights[..., None] * of_members).sum(1)
