"""One route for every sample, with weights chosen once: a Hub-Pathway without a router."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..routing import Routing

# The score of an expert that is not asked, and the noise scale of none: softmax and softplus of it
# are exactly 0 in float32; minus infinity would make NaN of 0 * infinity in a gradient.
NEVER = -1e4


class FixedRoutes(nn.Module):
    """Stands where a ``HubPathway`` has its generator: every sample is sent to the same K experts.

    Nothing is computed of the sample, and nothing is learned: the model asks it for the routing
    itself, so that the weights may have any sum (a generator's, of a softmax over all M experts,
    have one below 1 on the K active ones). It has no state: a model's file is as it was without it.

    Args:
        experts: K different experts, by number.
        weights: one for each, above 0.
        num_experts: M.

    Raises:
        ValueError: an expert that there is not, or twice; other weights than one above 0 for each.
    """

    def __init__(self, experts: Sequence[int], weights: Sequence[float], num_experts: int):
        super().__init__()
        experts, weights = list(experts), list(weights)
        whole = all(type(i) is int and 0 <= i < num_experts for i in experts)
        if not experts or not whole or len(set(experts)) < len(experts):
            raise ValueError(
                f"experts: expected different numbers in 0..{num_experts - 1}, got {experts}"
            )
        numbers = all(isinstance(w, (int, float)) and 0 < w < math.inf for w in weights)
        if len(weights) != len(experts) or not numbers:
            raise ValueError(
                f"weights: expected {len(experts)} finite numbers above 0, one for each of the "
                f"experts {experts}, got {weights}"
            )
        order = sorted(range(len(experts)), key=lambda i: (-weights[i], experts[i]))
        self.experts = tuple(experts[i] for i in order)  # the largest weight first
        self.weights = tuple(float(weights[i]) for i in order)
        self.num_experts = num_experts

    def routing(self, x: Tensor) -> Routing:
        """The routing of x [N, ...]; its ``mean`` [M] is the weights, 0 where not asked."""
        n, k, device = len(x), len(self.experts), x.device
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        weights = torch.tensor(self.weights, dtype=dtype, device=device)
        experts = torch.tensor(self.experts, device=device)
        ranks = experts.argsort()  # the slots, by expert
        sample = torch.arange(n, dtype=torch.int32, device=device)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        counts[experts] = n
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        return Routing(
            weights.expand(n, k).contiguous(),
            weights.new_zeros(self.num_experts).index_copy(0, experts, weights),
            experts.expand(n, k).contiguous(),
            offsets,
            (ranks.int()[:, None] + k * sample).flatten(),
            (ranks.argsort().int() * n + sample[:, None]).contiguous(),
            [n if i in self.experts else 0 for i in range(self.num_experts)],
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N, M] as any generator's: those whose softmax is the weights, brought to the sum
        1, and a noise scale of 0."""
        scores = torch.full((self.num_experts,), NEVER, device=x.device)
        scores[list(self.experts)] = torch.tensor(self.weights, device=x.device).log()
        clean = scores.expand(len(x), -1)
        return clean, torch.full_like(clean, NEVER)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, weights={self.weights}, num_experts={self.num_experts}"
