"""What learns to play: the interface of policies, and the one that is a single network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from .distribution import categorical_loss


class PolicyLosses(NamedTuple):
    """total: the scalar that is differentiated. task: [N], the unweighted loss of each sample, from
    which its priority is made. terms: for the log, by name: scalars, or [M] of a hub's experts."""

    total: Tensor
    task: Tensor
    terms: Mapping[str, Tensor]


@runtime_checkable
class Policy(Protocol):
    """A module that gives each action a distribution of its return, and learns it.

    States are uint8, frames [n, H, h, w] or packed [n, H, cells, pixels] (``FramePatches``). A is
    the number of actions, Z of atoms. A policy may have ``expert_weights(states) -> [n, M]`` (0
    where an expert is not asked), ``set_progress(step, steps)``, which is called before each
    update, and ``acting_logits(states)``, by which it acts while it learns, where these are others
    than those of a call.
    """

    num_actions: int
    atoms: Tensor  # [Z], the returns that probabilities are of

    def __call__(self, states: Tensor) -> Tensor:
        """Logits [n, A, Z]. Noisy layers are noisy in training mode; routing only where a setting
        asks for noise everywhere."""
        ...

    def losses(
        self, states: Tensor, actions: Tensor, target: Tensor, weights: Tensor
    ) -> PolicyLosses:
        """Of actions [N] against the distributions target [N, Z], with importance weights [N]."""
        ...


class SinglePolicy(nn.Module):
    """One network: from scratch, or a fine-tuned source.

    Args:
        network: states -> logits [n, A, Z], with ``num_actions``.
        atoms: [Z].
    """

    def __init__(self, network: nn.Module, atoms: Tensor):
        super().__init__()
        self.network = network
        self.num_actions = network.num_actions
        self.register_buffer("atoms", atoms.clone())

    def forward(self, states: Tensor) -> Tensor:
        return self.network(states)

    def losses(
        self, states: Tensor, actions: Tensor, target: Tensor, weights: Tensor
    ) -> PolicyLosses:
        task = categorical_loss(self.network(states), actions, target)
        return PolicyLosses((weights * task).mean(), task.detach(), {})
