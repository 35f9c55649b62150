"""Hub-Pathway as a Q-network (section 4.3 of the paper, which leaves all but the idea open).

    p(s) = softmax(clean(s) + eps * softplus(noise(s))),    K of M experts kept
    L(s) = A(concat_i w_i y_i(s))                           y_i(s) [A, Z]: logits of expert i
    q(s, a) = sum_z z * softmax(L(s)[a])_z

Choices of ours, each with its reason:

- Logits are combined before the softmax: a mixture is then geometric where the weights sum to 1.
- The aggregator mixes actions at each atom alike, not every atom of every action: A * M*A + A
  parameters instead of A*Z * M*A*Z, which would be more than an expert has.
- The routing is noisy where a gradient flows through it, in the loss of an update, and nowhere
  else: elsewhere the noise would blur a target, or the play from frame to frame.
- The generator has no BatchNorm. At one state it would have no statistics, and running ones chase
  states that change with the play.
- Every expert is held against the target that the hub is held against, with the same importance
  weights, so that it follows the hub's play and not one of its own.

The target network is a copy of all this, with a generator of its own; the learner makes it.

Letters: n states, M experts, K active ones, A actions, Z atoms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...model import HubPathway, HubPathwayLoss, LinearAggregator
from ...model.generator import start_equal
from ...routing import Routing
from .distribution import categorical_loss
from .network import RainbowNetwork, check_alike
from .patches import FramePatches
from .policy import PolicyLosses
from .settings import PATHWAY_NOISE

GENERATOR_HIDDEN = 64
# Of the networks' arguments. Experts may be of any widths.
ALIKE = ("num_actions", "num_atoms", "history", "frame_shape", "patches")


class StateGenerator(nn.Module):
    """Scores of experts from a state: the mean of each cell, a hidden layer and two linear heads.

    A cell is a window of the experts' first layer, 5 x 5 pixels of an Atari screen: which of 15 x
    15 places are bright, in each frame. What needs finer detail than that is the experts' to see;
    a generator on pixels would cost a third of an expert, in time.

    Args:
        num_experts: M. history: H. patches: how states are packed. hidden: width. noise_init: raw
            noise scale at the start.

    What ``RainbowNetwork.cells`` makes of states -> clean [n, M], noise [n, M]. Both heads start
    with zero weights, so that all experts start equally likely.
    """

    def __init__(
        self,
        num_experts: int,
        history: int,
        patches: FramePatches,
        hidden: int = GENERATOR_HIDDEN,
        noise_init: float = 0.0,
    ):
        super().__init__()
        cells, pixels = patches.shape
        self.history, self.scale = history, 1 / (255 * pixels)
        self.hidden = nn.Linear(history * cells, hidden)
        self.clean = nn.Linear(hidden, num_experts)
        self.noise = nn.Linear(hidden, num_experts)
        start_equal(self.clean, self.noise, noise_init)

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        sums = cells.unflatten(2, (self.history, -1)).sum(dim=3)  # [n, cells, H]
        features = torch.relu(self.hidden(sums.flatten(1) * self.scale))
        return self.clean(features), self.noise(features)


class HubPolicy(nn.Module):
    """A policy made of several: each state asks K of M networks and combines what they say.

    Args:
        networks: M experts of the same actions, atoms and states; they are the policy's from then
            on. ``heads.with_head`` gives a source the actions of another game.
        atoms: [Z], the returns that probabilities are of.
        k: K. At K = M, as in the paper, every network is asked, with weights that differ by state.
        explore: weight of the exploration loss.
        renormalize: divide the K weights by their sum. Not in the paper: there a weight below 1
            flattens the distributions, at K = 1 to a power of the expert's.
        pathway_noise: where the routing is noisy in training mode: "update", in the losses; "act",
            also in ``acting_logits``; "all", in every forward pass.

    Modules: ``hub``, a ``HubPathway``.

    Raises:
        ValueError: no networks or ones that differ, other atoms, a wrong k or pathway_noise.
    """

    def __init__(
        self,
        networks: Sequence[RainbowNetwork],
        atoms: Tensor,
        k: int = 2,
        explore: float = 0.5,
        renormalize: bool = False,
        pathway_noise: str = "update",
    ):
        super().__init__()
        check_alike(networks, atoms, "a hub", 1, ALIKE)
        if pathway_noise not in PATHWAY_NOISE:
            allowed = ", ".join(PATHWAY_NOISE)
            raise ValueError(f"pathway_noise: expected one of {allowed}, got {pathway_noise!r}")
        first, count = networks[0], len(networks)
        self.num_actions, self.pathway_noise = first.num_actions, pathway_noise
        self.hub = HubPathway(
            networks,
            StateGenerator(count, first.history, first.patches),
            LinearAggregator(count, first.num_actions),
            k,
            min_group=1,  # there is no BatchNorm
            executor="sequential",  # of small networks; a whole update can be captured around it
            renormalize=renormalize,
        )
        self.criterion = HubPathwayLoss(_task_loss, explore)
        self.register_buffer("atoms", atoms.clone())

    def forward(self, states: Tensor) -> Tensor:
        """[n, A, Z]: the combined logits of states, uint8, plain or packed."""
        return self._logits(states, self.training and self.pathway_noise == "all")

    def acting_logits(self, states: Tensor) -> Tensor:
        """What an action is chosen by while the policy learns: as ``forward``, with the routing
        noisy if ``pathway_noise`` says so."""
        return self._logits(states, self.training and self.pathway_noise != "update")

    def _logits(self, states: Tensor, noisy: bool) -> Tensor:
        cells = self._cells(states)
        return self.hub(cells).prediction if noisy else self.hub.predict(cells)

    def losses(
        self, states: Tensor, actions: Tensor, target: Tensor, weights: Tensor
    ) -> PolicyLosses:
        """Task, exploration and exploitation of actions [N] against the distributions target
        [N, Z], which are given: no expert makes one of its own. In training mode.

        terms: ``explore`` and ``exploit``; ``share`` [M], of states that ask an expert; ``weights``
        [M], its mean weight, 0 where it is not asked.
        """
        if not self.training:
            raise ValueError("losses: the policy is in evaluation mode; call policy.train() first")
        output = self.hub(self._cells(states))
        losses = self.criterion(output, (actions, target), weights)
        routing = output.routing
        terms = {
            "explore": losses.explore,
            "exploit": losses.exploit,
            "share": routing.offsets.diff() / routing.num_samples,
            "weights": _by_expert(routing).mean(dim=0),
        }
        return PolicyLosses(
            losses.total,
            losses.per_sample.detach(),
            {name: term.detach() for name, term in terms.items()},
        )

    @torch.no_grad()
    def expert_weights(self, states: Tensor) -> Tensor:
        """[n, M]: the weight of each expert in each state, without noise, 0 where not asked."""
        return _by_expert(self.hub.route(self._cells(states), noisy=False))

    def _cells(self, states: Tensor) -> Tensor:
        """Numbers are made of bytes once for all experts and the generator."""
        return self.hub.experts[0].cells(states)

    def extra_repr(self) -> str:
        return f"pathway_noise={self.pathway_noise}"


def _task_loss(logits: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    return categorical_loss(logits, *y)


def _by_expert(routing: Routing) -> Tensor:
    """The weights [N, K] as [N, M]."""
    weights = routing.weights.detach()
    dense = weights.new_zeros(routing.num_samples, routing.num_experts)
    return dense.scatter(1, routing.experts, weights)
