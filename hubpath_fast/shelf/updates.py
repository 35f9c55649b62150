"""Updates of all experts' heads in two launches, in place of an optimizer's own.

torch's AdamW goes over hundreds of parameters on the host, and leaves out those that have no
gradient; which experts had no rows would have to be read. Here the moments are flat tensors like
the parameters, and the device knows. The optimizer's state stays what it is: its tensors are views
of these, so that checkpoints are those of any run, whose moments are taken over in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .bank import HeadBank

MOMENTS = ("exp_avg", "exp_avg_sq")


class HeadUpdates:
    """``step`` is what the optimizer's step does for the heads of a bank, as a hook before it."""

    def __init__(self, bank: HeadBank, optimizer: torch.optim.AdamW, ops: ModuleType):
        self.bank, self.optimizer, self._ops = bank, optimizer, ops
        # Numbers of the groups: loading a state makes new ones.
        self._groups = [_group(optimizer, ps) for ps in (bank.weights, bank.biases)]
        count, dtype = len(bank.weights), bank.flat.dtype
        self.moments = [torch.zeros_like(bank.flat.detach()) for _ in MOMENTS]
        self.steps = bank.flat.new_zeros(2, count, dtype=torch.float32)
        self.rates = bank.flat.new_zeros(2, dtype=torch.promote_types(dtype, torch.float32))
        self._told: list[float] = []
        self._take_state()

    def step(self, *_: Any) -> None:
        gradient, self.bank.flat.grad = self.bank.flat.grad, None
        if gradient is None:
            return
        if not self.bank.is_in_place:
            raise ValueError(
                "experts: expected parameters where they were in backward(), got some moved to "
                "other memory before step(), which would not update them; move them after it"
            )
        if not self._has_state():
            self._take_state()
        first, second = (self.optimizer.param_groups[number] for number in self._groups)
        rates = [first["lr"], second["lr"]]
        if rates != self._told:
            self.rates.fill_(rates[0])
            if rates[1] != rates[0]:
                self.rates[1].fill_(rates[1])
            self._told = rates
        self._ops.update_heads(
            self.bank.flat.detach(),
            gradient,
            *self.moments,
            self.bank.table,
            self.bank.touched,
            self.steps,
            self.powers,
            self.rates,
            (first["weight_decay"], second["weight_decay"]),
            first["betas"],
            first["eps"],
        )
        torch.autograd.graph.increment_version(self.bank.weights)  # see ``count_updates``
        torch.autograd.graph.increment_version(self.bank.biases)

    def _has_state(self) -> bool:
        """Whether the optimizer's state is still what lies here: it is another after loading."""
        state = self.optimizer.state.get(self.bank.weights[0], {})
        return state.get(MOMENTS[0]) is self._first

    @torch.no_grad()
    def _take_state(self) -> None:
        """Has the optimizer's state lie here, with what it is."""
        parameters = (*self.bank.weights, *self.bank.biases)
        views = zip(*(self.bank.views(each) for each in self.moments), strict=True)
        steps = self.steps.flatten()
        for i, (p, own) in enumerate(zip(parameters, views, strict=True)):
            kept = self.optimizer.state.get(p, {})
            for name, view in zip(MOMENTS, own, strict=True):
                view.copy_(kept[name]) if name in kept else view.zero_()
            steps[i] = kept.get("step", 0.0)
            self.optimizer.state[p] = {"step": steps[i], **dict(zip(MOMENTS, own, strict=True))}
        self._first = self.optimizer.state[parameters[0]][MOMENTS[0]]
        betas = self.optimizer.param_groups[self._groups[0]]["betas"]
        betas = torch.tensor(betas, dtype=torch.float64, device=steps.device)
        self.powers = betas[:, None, None] ** self.steps.double()


def can_update(bank: HeadBank, optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``HeadUpdates`` does what this optimizer would: AdamW as it is by default, all heads
    trained, their weights in one group and their biases in one."""
    if type(optimizer) is not torch.optim.AdamW:
        return False
    if not all(p.requires_grad for p in (*bank.weights, *bank.biases)):
        return False
    found = [_group(optimizer, parameters) for parameters in (bank.weights, bank.biases)]
    if None in found:
        return False
    first, second = (optimizer.param_groups[number] for number in found)
    if any(group["amsgrad"] or group["maximize"] for group in (first, second)):
        return False
    return all(first[key] == second[key] for key in ("betas", "eps"))


def _group(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> int | None:
    """The number of the group that has all of these; None: there is none."""
    wanted = set(map(id, parameters))
    for number, group in enumerate(optimizer.param_groups):
        if wanted <= set(map(id, group["params"])):
            return number
    return None
