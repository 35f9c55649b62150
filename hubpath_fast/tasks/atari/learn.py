"""One update of Rainbow (Hessel et al., 2018), whatever the policy: it reads from top to bottom."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .distribution import double_q_target, expected_values, greedy_actions
from .noisy import draw_noise
from .policy import Policy, PolicyLosses
from .settings import AtariSettings


class Batch(NamedTuple):
    """Transitions of N starts; see ``PrioritizedReplay.sample``."""

    states: Tensor  # uint8 [N, H, ...]
    actions: Tensor  # int64 [N]
    returns: Tensor  # [N], of n steps
    discounts: Tensor  # [N], gamma ** steps, 0 after a terminal
    next_states: Tensor  # uint8 [N, H, ...]
    weights: Tensor  # [N], importance


class Update(NamedTuple):
    """losses: of the policy. norm: of the gradient, before it was clipped."""

    losses: PolicyLosses
    norm: Tensor


class Learner:
    """A policy, its target network and its optimizer.

    The noise of the policy's layers is the step's: who acts draws it, by ``new_noise``, and the
    update that follows uses the same for s and s'. The target's is drawn for each update.

    noise: generator of all noise, on the CPU.
    """

    def __init__(self, policy: Policy, settings: AtariSettings, noise: torch.Generator):
        self.settings, self.noise = settings, noise
        self.policy = policy.train()
        self.target = copy.deepcopy(policy).train().requires_grad_(False)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        capturable = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.parameters, settings.lr, eps=settings.adam_eps, fused=True, capturable=capturable
        )
        self.notes: list[str] = []  # for the log, which takes them

    def new_noise(self) -> None:
        """Draws the policy's noise of the next step."""
        draw_noise(self.policy, self.noise)

    def act(self, state: Tensor) -> int:
        """The action of the largest expected return in a state [1, H, ...]; the first of equals."""
        return int(self.best_action(state.to(self.device)))

    @torch.no_grad()
    def best_action(self, state: Tensor) -> Tensor:
        """[1]; the state is on the device, and so is the action."""
        logits = getattr(self.policy, "acting_logits", self.policy)(state)
        return greedy_actions(expected_values(logits, self.policy.atoms))

    def update(self, batch: Batch) -> Update:
        """One step of the optimizer on a batch, wherever that is."""
        draw_noise(self.target, self.noise)
        return self.compute(Batch(*(part.to(self.device, non_blocking=True) for part in batch)))

    def compute(self, batch: Batch) -> Update:
        """The update of a batch on the device without its draws: it waits for no value there."""
        settings = self.settings
        with torch.no_grad():
            target = double_q_target(
                self.policy(batch.next_states),
                self.target(batch.next_states),
                batch.returns,
                batch.discounts,
                settings.v_min,
                settings.v_max,
            )
        losses = self.policy.losses(batch.states, batch.actions, target, batch.weights)
        self.optimizer.zero_grad()
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm, foreach=True)
        self.optimizer.step()
        detached = {name: value.detach() for name, value in losses.terms.items()}
        return Update(PolicyLosses(losses.total.detach(), losses.task, detached), norm)

    @torch.no_grad()
    def copy_to_target(self) -> None:
        """The target becomes the policy as it is."""
        for mine, kept in zip(self.policy.parameters(), self.target.parameters(), strict=True):
            kept.copy_(mine)
        for mine, kept in zip(self.policy.buffers(), self.target.buffers(), strict=True):
            kept.copy_(mine)

    def modules(self) -> nn.ModuleDict:
        """What a checkpoint keeps of the weights."""
        return nn.ModuleDict({"online": self.policy, "target": self.target})
