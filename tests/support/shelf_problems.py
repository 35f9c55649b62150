"""Problems for the rivals of a routed shelf, made of probabilities that are there already."""

from __future__ import annotations

import torch
from torch import Tensor

from hubpath_fast.shelf.rivals import Look, Problem


def problem_of_logits(
    logits: dict[str, Tensor], targets: dict[str, Tensor], vectors: dict[str, Tensor], k: int = 1,
    **more,
) -> Problem:  # fmt: skip
    """logits: of each split [M, n, C]. vectors: [n, F] of each, what the image looks like."""
    models = len(logits["validation"])
    return Problem(
        labels=tuple(f"model{i}" for i in range(models)),
        log_probs={split: each.float().log_softmax(-1) for split, each in logits.items()},
        targets=targets,
        k=k,
        looks=more.pop("looks", (Look("the image", vectors),)),
        parameters=100.0 * torch.arange(1, models + 1, dtype=torch.float64),
        ms=torch.arange(1, models + 1, dtype=torch.float64),
        **more,
    )


def drawn(
    models: int = 6, classes: int = 4, images: int = 40, width: int = 3, seed: int = 0, **more
) -> Problem:
    """Models that are linear on the vectors of the images, whose targets are noise and the first
    models' opinion: each is right now and then."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(models, classes, width, generator=draw)
    logits, targets, vectors = {}, {}, {}
    for split, count in (("validation", images), ("test", images // 2 + 3)):
        seen = torch.randn(count, width, generator=draw)
        vectors[split] = seen / seen.norm(dim=1, keepdim=True)
        logits[split] = torch.einsum("mcf,nf->mnc", weights, vectors[split])
        own = logits[split][torch.arange(count) % models, torch.arange(count)].argmax(-1)
        noise = torch.randint(classes, (count,), generator=draw)
        targets[split] = torch.where(torch.rand(count, generator=draw) < 0.7, own, noise)
    return problem_of_logits(logits, targets, vectors, **more)


def clusters(per_cluster: int = 12, classes: int = 3, **more) -> Problem:
    """Two models and two clusters of images: model i tells the classes of cluster i, and says of
    the other cluster the class after the right one. Half of the images are of either."""
    logits, targets, vectors = {}, {}, {}
    for split in ("validation", "test"):
        target = torch.arange(2 * per_cluster) % classes
        cluster = torch.arange(2 * per_cluster) // per_cluster
        right, wrong = (
            torch.nn.functional.one_hot((target + i) % classes, classes) for i in (0, 1)
        )
        here = cluster[:, None]
        logits[split] = 3.0 * torch.stack([torch.where(here == i, right, wrong) for i in (0, 1)])
        targets[split] = target
        angle = cluster * 2.0 + 0.01 * torch.arange(2 * per_cluster)
        vectors[split] = torch.stack([angle.cos(), angle.sin()], 1)
    return problem_of_logits(logits, targets, vectors, **more)
