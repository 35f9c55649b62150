"""Votes over separately fine-tuned models, and the oracle that knows whom to ask.

Shapes: S models, N samples, C classes; probabilities are [S, N, C].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_vote(probabilities: Tensor) -> Tensor:
    """[S, N, C] -> [N] int64: the class of the largest mean probability."""
    return probabilities.mean(dim=0).argmax(dim=1)


def hard_vote(probabilities: Tensor) -> Tensor:
    """[S, N, C] -> [N] int64: the class most models choose; a tie goes to the soft vote.

    A model's ballot is its class of largest probability. The mean probability is below 1 a ballot,
    so half of it can decide a tie but never overturn a majority.
    """
    ballots = F.one_hot(probabilities.argmax(dim=2), probabilities.shape[2]).sum(dim=0)
    return (ballots + 0.5 * probabilities.mean(dim=0)).argmax(dim=1)


def oracle(probabilities: Tensor, targets: Tensor) -> Tensor:
    """[S, N, C], [N] -> [N] bool: whether some model is right (table 5 of the paper)."""
    return (probabilities.argmax(dim=2) == targets).any(dim=0)


def best_k(scores: Sequence[float], k: int) -> list[int]:
    """The indices of the k largest scores, the lowest index first among equals."""
    order = torch.tensor(scores, dtype=torch.float64).sort(descending=True, stable=True).indices
    return order[:k].tolist()
