"""The three losses of Hub-Pathway and their sum (equations 2, 4, 5 and 6 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as HF
from .._checks import check_classes, check_range
from .._torch_ops import accumulator, sample_of_row
from .output import PathwayOutput


@dataclass(frozen=True)
class PathwayLosses:
    """Scalars: ``total = task + explore_weight * explore + exploit``; the parts are unweighted."""

    total: Tensor
    task: Tensor
    explore: Tensor
    exploit: Tensor


class HubPathwayLoss(nn.Module):
    """``total = task + explore * sum_i pbar_i log pbar_i + exploit``.

    One backward pass of the total is equation 6: the exploration loss reaches the generator only,
    the exploitation loss the experts only.

    Args:
        task_loss: a callable (prediction [n, C, ...], y [n, ...]) -> [n], the loss of each sample,
            used for the task and for each expert's own rows; default cross-entropy (averaged over
            the positions of a map) against classes [n, ...] or class probabilities [n, C, ...].
        explore: lambda, the weight of the exploration loss. The paper does not print its value;
            0.5 is our choice (on validation data of the demo, 0.5 and 1 came out alike).
        label_smoothing: of the default cross-entropy, in [0, 1].
        exploit: False leaves the exploitation loss out, as the ablation of table 4 does; it is then
            reported as 0.

    When ``torch.distributed`` is initialised, pbar is the mean over all ranks' batches; the
    gradient is right under DistributedDataParallel, which averages over the ranks.
    """

    def __init__(
        self,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        explore: float = 0.5,
        label_smoothing: float = 0.0,
        exploit: bool = True,
    ):
        super().__init__()
        if explore < 0:
            raise ValueError(f"explore: expected a weight >= 0, got {explore}")
        if task_loss is not None and label_smoothing:
            raise ValueError(
                "label_smoothing: only for the default cross-entropy; use task_loss's own"
            )
        self.task_loss, self.explore, self.label_smoothing = task_loss, explore, label_smoothing
        self.exploit = exploit

    @property
    def can_fuse(self) -> bool:
        """Whether the model may compute the exploit loss itself: it is the plain cross-entropy."""
        return self.task_loss is None and self.exploit

    def forward(
        self, out: PathwayOutput, y: Tensor, sample_weight: Tensor | None = None
    ) -> PathwayLosses:
        """Losses of a ``PathwayOutput`` against targets y [N, ...].

        Args:
            out: what the model returned in training mode.
            y: targets, one a sample along dimension 0; of the default loss int64 classes [N, ...]
                or floats [N, C, ...], the probabilities of classes (mixup's and cutmix's targets).
            sample_weight: [N] or None; multiplies the loss of each sample and of its rows (as
                importance weights of a replay buffer do); the divisor stays N.

        Raises:
            ValueError: y or sample_weight of another length than the batch, targets of another
                shape or dtype, classes out of range (on the CPU), or a task loss that does not
                return one value a sample.
        """
        n = out.prediction.shape[0]
        if len(y) != n:
            found = list(getattr(y, "shape", [len(y)]))
            raise ValueError(f"y: expected {n} targets as predictions, got {found}")
        if sample_weight is not None and list(sample_weight.shape) != [n]:
            raise ValueError(f"sample_weight: expected [{n}], got {list(sample_weight.shape)}")
        if self.task_loss is None:
            check_classes("y", y, n, out.prediction)
        task = self._per_sample(out.prediction, y)
        if sample_weight is not None:
            task = task * sample_weight
        task = task.mean()
        explore = HF.exploration_loss(_mean_over_ranks(out.routing.mean))
        exploit = self._exploit(out, y, sample_weight) if self.exploit else task.new_zeros(())
        return PathwayLosses(task + self.explore * explore + exploit, task, explore, exploit)

    def _exploit(self, out: PathwayOutput, y: Tensor, sample_weight: Tensor | None) -> Tensor:
        routing = out.routing
        if self.task_loss is None and sample_weight is None:
            fused = out.fused_exploit
            loss = None if fused is None else fused.loss(y, self.label_smoothing)
            if loss is None:
                loss = HF.exploit_loss(out.expert_outputs, routing, y, self.label_smoothing)
            return loss
        sample = sample_of_row(routing.rows, routing.k)
        loss = self._per_sample(out.expert_outputs, y.index_select(0, sample))
        if sample_weight is not None:
            loss = loss * sample_weight.index_select(0, sample)
        return loss.sum() / len(y)

    def _per_sample(self, prediction: Tensor, y: Tensor) -> Tensor:
        n = prediction.shape[0]
        if self.task_loss is not None:
            loss = self.task_loss(prediction, y)
            if list(loss.shape) != [n]:
                raise ValueError(
                    f"task_loss: expected one loss a sample, [{n}], got {list(loss.shape)}; "
                    'use reduction="none" and average over everything but dimension 0'
                )
            return loss
        if y.is_floating_point():
            y = y.to(accumulator(prediction.dtype))
        try:
            loss = F.cross_entropy(
                prediction, y, reduction="none", label_smoothing=self.label_smoothing
            )
        except IndexError:  # of the CPU, which has looked at the classes already
            check_range("y", y, prediction)
            raise
        return loss if loss.dim() == 1 else loss.flatten(1).mean(dim=1)

    def extra_repr(self) -> str:
        exploit = "" if self.exploit else ", exploit=False"
        return f"explore={self.explore}, label_smoothing={self.label_smoothing}{exploit}"


def _mean_over_ranks(mean: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(mean) / dist.get_world_size()
