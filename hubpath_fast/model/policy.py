"""What a trained model's predictions may cost: fewer experts where a sample needs no more.

A policy changes how samples are routed in evaluation mode; nothing is trained again.

    z = clean - penalty                       penalty_i = mu * (milliseconds of expert i)
    p = softmax(z), the K' largest are active
    of these, sorted, the first j, with j as small as p_1 + ... + p_j >= top_mass allows

The share is one of p's whole mass, over all M experts, so that "0.9" means the same whatever K is:
where the K' largest hold less than that, all K' are kept. Weights stay p itself, as equation 1 has
them, of the experts that are kept; they are brought to the sum 1 only where the model renormalises.
Fixed routes keep the weights that were chosen for them, whose sum is their own in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as HF
from .._checks import check_k, is_finite_number
from ..routing import Routing


@dataclass(frozen=True)
class RoutingPolicy:
    """How many experts a prediction asks, and which it would rather not: ``model.policy``.

    Args:
        top_mass: in (0, 1]: experts are asked, the likeliest first, until they hold this share of
            the router's softmax, at most K of them; None: K.
        penalty: [M] finite numbers, subtracted from the clean scores: mu times what each expert
            costs. None: nothing is.
        k: K' instead of the model's K, at most that; None: the model's.

    Raises:
        ValueError: a value out of range; ``check`` says so of what does not fit a model.
    """

    top_mass: float | None = None
    penalty: Sequence[float] | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        if self.top_mass is not None:
            if not _is_share(self.top_mass):
                raise ValueError(
                    f"top_mass: expected a number above 0 and up to 1, got {self.top_mass!r}; 0.9 "
                    "asks as many experts as hold 90 % of the router's weight"
                )
            object.__setattr__(self, "top_mass", float(self.top_mass))
        if self.penalty is not None:
            values = self.penalty.tolist() if isinstance(self.penalty, Tensor) else self.penalty
            if not isinstance(values, Sequence) or not all(map(is_finite_number, values)):
                raise ValueError(
                    f"penalty: expected a finite number for each expert, got {values!r}"
                )
            object.__setattr__(self, "penalty", tuple(float(value) for value in values))
        if self.k is not None and (type(self.k) is not int or self.k < 1):
            raise ValueError(f"k: expected an integer of at least 1, got {self.k!r}")

    def check(self, k: int, num_experts: int) -> None:
        """Raises ValueError where it is no policy for a model of M experts, K of them active."""
        if self.penalty is not None and len(self.penalty) != num_experts:
            raise ValueError(
                f"penalty: expected {num_experts} numbers, one for each expert, got "
                f"{len(self.penalty)}; set the model's policy again"
            )
        if self.k is not None:
            check_k(self.k, k)

    def route(self, clean: Tensor, noise: Tensor, k: int, renormalize: bool = False) -> Routing:
        """The routing of scores [N, M], without noise. k, renormalize: of the model."""
        self.check(k, clean.shape[1])
        if self.penalty is not None:
            # Under autocast scores come in half precision, which would round the penalty away.
            scores = clean if clean.dtype == torch.float64 else clean.float()
            clean, noise = scores - scores.new_tensor(self.penalty), noise.to(scores.dtype)
        k = k if self.k is None else self.k
        if self.top_mass is None:
            return HF.noisy_topk(clean, noise, k, None, renormalize)
        routing = HF.noisy_topk(clean, noise, k)
        return drop(routing, routing.weights, self.top_mass, renormalize)

    def route_fixed(self, routing: Routing, k: int) -> Routing:
        """The routing of ``FixedRoutes``, whose whole mass is the sum of its weights. k: of the
        model; where its routes are more, those with the largest weights are kept."""
        if self.penalty is not None:
            raise ValueError(
                "penalty: it is subtracted from a router's scores, and the model has fixed routes "
                "in place of a router; give top_mass or k"
            )
        if self.k is not None:
            check_k(self.k, k)
            slot = torch.arange(routing.k, device=routing.experts.device)
            routing = routing.keeping((slot < self.k).expand_as(routing.experts))
        if self.top_mass is None:
            return routing
        shares = routing.weights / routing.mean.sum()
        return drop(routing, shares, self.top_mass, False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; ``from_dict`` reads it."""
        penalty = None if self.penalty is None else list(self.penalty)
        return {"top_mass": self.top_mass, "penalty": penalty, "k": self.k}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingPolicy:
        """Raises ValueError for other keys than its fields, and as the class does."""
        unknown = sorted(set(values) - {"top_mass", "penalty", "k"})
        if unknown:
            raise ValueError(f"policy: expected top_mass, penalty and k, got {unknown}")
        return cls(**values)


def drop(routing: Routing, shares: Tensor, top_mass: float, renormalize: bool) -> Routing:
    """Keeps of each sample the first slots that hold ``top_mass`` together; shares: [N, K] of the
    whole mass, largest first."""
    before = F.pad(shares.detach().cumsum(dim=1)[:, :-1], (1, 0))
    kept = routing.keeping(before < top_mass)
    if renormalize:
        kept.weights = kept.weights / kept.weights.sum(dim=1, keepdim=True)
    return kept


def dense_weights(routing: Routing) -> Tensor:
    """[N, M] of a routing's weights [N, K], 0 where an expert is not asked."""
    dense = routing.weights.new_zeros(routing.num_samples, routing.num_experts)
    # A dropped slot stands for the first one again, with the weight 0.
    return dense.scatter_reduce(1, routing.experts, routing.weights, "amax")


def _is_share(value: Any) -> bool:
    return is_finite_number(value) and 0 < value <= 1
