"""No step and no checkpoint with values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints import find_checkpoint
from ..parallel.ranks import Ranks
from ..resting import one_by_one
from .step_window import StepWindow


class NonFiniteLoss(FloatingPointError):
    """Training met a loss, or a state to save, that is not finite.

    step: the update at which it appeared; terms: the losses by name; experts: names of the experts
    whose outputs were not finite, where known; checkpoint: the last good one, or None.
    """

    def __init__(self, message: str, step: int, terms=None, experts=(), checkpoint=None) -> None:
        super().__init__(message)
        self.step, self.terms = step, dict(terms or {})
        self.experts, self.checkpoint = list(experts), checkpoint


class FiniteGuard:
    """Raises NonFiniteLoss for losses and states that are not finite.

    expert_name: an expert's index to its name in messages. out_dir: where the checkpoints lie.
    ranks: of the run: what one of them finds, all raise alike, so all ask together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        out_dir: Path,
        expert_name: Callable[[int], str],
        ranks: Ranks = Ranks(),
    ) -> None:
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self.out_dir, self.expert_name = out_dir, expert_name
        # Buffers that hold infinities by design (a mask) are no sign of trouble.
        self._buffers = [name for name, b in model.named_buffers() if _all_finite([b])]

    def check_losses(self, window: StepWindow) -> None:
        """Raise NonFiniteLoss if a loss since the last report is not finite (waits for a GPU)."""
        by_rank = self.ranks.gather(window.first_bad())
        bad = {rank: found for rank, found in enumerate(by_rank) if found is not None}
        if not bad:
            return
        step = min(found.step for found in bad.values())
        bad = {rank: found for rank, found in bad.items() if found.step == step}
        terms = next(iter(bad.values())).terms
        experts = sorted({i for found in bad.values() for i in found.experts})
        named = [self.expert_name(i) for i in experts]
        culprits = [f"the outputs of {', '.join(named)}"] if named else []
        culprits += ["the generator's scores"] if any(f.router for f in bad.values()) else []
        raise self.non_finite(
            f"the loss of step {step} is not finite{self._where(bad)}: "
            + ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
            + (f"; so are {' and '.join(culprits)}" if culprits else ""),
            step,
            terms,
            named,
        )

    def check_state(self, step: int) -> None:
        """Raise NonFiniteLoss if anything that a checkpoint would hold is not finite."""
        buffers = dict(self.model.named_buffers())
        held = {
            "a parameter": list(self.model.parameters()),
            "a buffer": [buffers[name] for name in self._buffers if name in buffers],
            "the optimizer's state": [
                value
                for entry in self.optimizer.state.values()
                for value in entry.values()
                if isinstance(value, Tensor)
            ],
        }
        own = next((what for what, tensors in held.items() if not _all_finite(tensors)), None)
        bad = {rank: what for rank, what in enumerate(self.ranks.gather(own)) if what is not None}
        if bad:
            what = next(iter(bad.values()))
            text = f"{what} is not finite after step {step}{self._where(bad)}"
            raise self.non_finite(text, step)

    def non_finite(self, text: str, step: int, terms=None, experts=()) -> NonFiniteLoss:
        """The error of what ``text`` says, with the last good checkpoint and what may help."""
        kept = find_checkpoint(self.out_dir / "last") or find_checkpoint(self.out_dir / "best")
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        error = NonFiniteLoss(
            f"{text}; {where}. Lower the learning rates or set clip_norm, and look at the data",
            step,
            terms,
            experts,
            kept,
        )
        error.agreed = not self.ranks.single  # so that one rank is enough to print it
        return error

    def _where(self, ranks: Iterable[int]) -> str:
        return "" if self.ranks.single else f" on rank {', '.join(map(str, ranks))}"


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all floating-point tensors are finite; one read of the device. Of those
    that rest in files not all are in memory at once."""
    tensors = [t for t in tensors if t.is_floating_point() and t.numel() and not t.is_meta]
    tensors = [t.detach() for t in tensors]
    if not tensors:
        return True
    finite = [
        torch.isfinite(nn.utils.get_total_norm(some, norm_type=math.inf))
        for some in one_by_one(tensors)
    ]
    return bool(torch.stack([each.to(finite[0].device) for each in finite]).all())
