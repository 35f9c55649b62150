"""Hub-Pathway with a part taken away: generators that choose without looking, and without noise.

Each stands where a ``HubPathway`` has its generator: x [N, ...] -> (clean [N, M], noise [N, M]).
``seen`` and ``from_seen`` are its two parts, as those of ``PathwayGenerator``.
The ablations of the losses are arguments of ``HubPathwayLoss`` (explore=0, exploit=False).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_k
from ..model.fixed_routes import NEVER

EVAL_SEED = 1


class Blind(nn.Module):
    """A generator that looks at nothing: of x only its length matters."""

    def seen(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), 0)

    def from_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x)


class RandomGenerator(Blind):
    """K different experts for each sample, drawn uniformly, with weights of 1/K (table 4's "random
    path"). The paper does not say how the paths are weighted; equal weights are our choice.

    Training draws from torch's generator. Evaluation draws the same paths at every call for a batch
    of the same length, so that it can be repeated.
    """

    def __init__(self, num_experts: int, k: int):
        super().__init__()
        check_k(k, num_experts)
        self.num_experts, self.k = num_experts, k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        own = None if self.training else torch.Generator().manual_seed(EVAL_SEED)
        order = torch.rand(len(x), self.num_experts, generator=own).argsort(dim=1).to(x.device)
        never = torch.full((len(x), self.num_experts), NEVER, device=x.device)
        return never.scatter(1, order[:, : self.k], 0.0), torch.full_like(never, NEVER)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, k={self.k}"


class TaskGenerator(Blind):
    """One route for the whole data set: scores and noise scales that no input can change.

    Both are learned as those of ``PathwayGenerator`` are, and start as its do: all experts equally
    likely, and a raw noise scale of 0.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.clean = nn.Parameter(torch.zeros(num_experts))
        self.noise = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.clean.repeat(len(x), 1), self.noise.repeat(len(x), 1)


class Noiseless(nn.Module):
    """A generator without its noise: the scores of ``generator``, and a noise scale of 0."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._silent(self.generator(x))

    def seen(self, x: Tensor) -> Tensor:
        return self.generator.seen(x)

    def from_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._silent(self.generator.from_seen(x))

    @staticmethod
    def _silent(scores: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        clean, noise = scores
        return clean, torch.full_like(noise, NEVER)
