"""Rivals that run the same models for every image, and the best of all for each image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..selection import greedy
from .problem import Answer, Problem, always, mix

DRAWS = 50  # of K models at random


def best_single(problem: Problem) -> Answer:
    """The head with the least validation loss."""
    return _fixed(problem, problem.losses("validation").mean(0).argmin()[None])


def static_best(problem: Problem) -> Answer:
    """K models, the next always the one with which the mean of probabilities loses the least."""
    logits, targets = problem.log_probs["validation"], problem.targets["validation"]
    return _fixed(problem, torch.tensor(greedy_order(logits, targets, problem.k, "ensemble")))


def uniform(problem: Problem) -> Answer:
    """All models, the mean of their probabilities."""
    members = torch.arange(len(problem.labels))
    return Answer(_mean(problem, members), always(members, problem))


def random_sets(problem: Problem) -> Answer:
    """K models at random: means over draws, of scores as of costs."""
    draw = torch.Generator().manual_seed(problem.seed)
    count = len(problem.labels)
    sets = [torch.randperm(count, generator=draw)[: problem.k] for _ in range(DRAWS)]
    share = torch.cat(sets).bincount(minlength=count).double() / DRAWS
    each = [_mean(problem, members) for members in sets]
    stacked = {split: torch.stack([one[split] for one in each]) for split in problem.splits}
    return Answer(stacked, always(share, problem), share, {"draws": DRAWS})


def oracle(problem: Problem) -> Answer:
    """For each image a head that is right, if there is one: it knows the target. A bound for who
    asks one model about an image; several together may be right where none of them is."""
    probabilities, best = {}, {}
    for split in problem.splits:
        log_probs, targets = problem.log_probs[split], problem.targets[split]
        right = (log_probs.argmax(-1) == targets).T  # [n, M]
        likelihood = (-problem.losses(split)).exp()
        best[split] = (right + likelihood / 2).argmax(1)  # right first, then the surest
        probabilities[split] = log_probs[best[split], torch.arange(len(targets))].exp()
    asked = torch.nn.functional.one_hot(best[problem.split], len(problem.labels)).float()
    return Answer(probabilities, asked)


def greedy_order(logits: Tensor, targets: Tensor, count: int, objective: str) -> list[int]:
    """Numbers of ``count`` models, as greedy selection takes them in turn."""
    return [step.index for step in greedy(logits, targets, count, objective)]


def _fixed(problem: Problem, members: Tensor) -> Answer:
    chosen = {"models": [problem.labels[i] for i in members]}
    return Answer(_mean(problem, members), always(members, problem), chosen=chosen)


def _mean(problem: Problem, members: Tensor) -> dict[str, Tensor]:
    weights = torch.full((len(members),), 1 / len(members))
    return {split: mix(problem.log_probs[split][members], weights) for split in problem.splits}
