"""The three losses of Hub-Pathway and their sum (equations 2, 4, 5 and 6 of the paper).

A fourth, which supervises the router, is ours and off by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import functional as HF
from .._checks import (
    check_classes,
    check_device,
    check_range,
    check_router,
    check_smoothing,
    check_some,
    check_temperature,
    check_weight,
)
from .._torch_ops import losses_of_samples, router_loss_of_rows
from .._torch_rows import sample_of_row
from .._total_loss import unchecked_total_loss
from ..parallel.collectives import mean_over_batch
from ..parallel.ranks import everyone
from .output import PathwayOutput
from .targets import Targets, check_lengths, of_samples


@dataclass(frozen=True)
class PathwayLosses:
    """Scalars: ``total = task + explore_weight * explore + exploit``; the parts are unweighted.

    router: of the supervision of the router, which adds ``router_supervision * router`` to the
    total; 0 where it is off.
    per_sample: [N], the task loss of each sample, not multiplied by its weight: what a replay
    buffer takes priorities from.
    """

    total: Tensor
    task: Tensor
    explore: Tensor
    exploit: Tensor
    router: Tensor
    per_sample: Tensor


class HubPathwayLoss(nn.Module):
    """``total = task + explore * sum_i pbar_i log pbar_i + exploit``, and our addition if it is on.

    One backward pass of the total is equation 6: the exploration loss reaches the generator only,
    the exploitation loss the experts only.

    Args:
        task_loss: a callable (prediction [n, C, ...], y [n, ...]) -> [n], the loss of each sample,
            used for the task and for each expert's own rows; y may be a tuple or a dict of tensors,
            of which it gets the same samples each; default cross-entropy (averaged over
            the positions of a map) against classes [n, ...] or class probabilities [n, C, ...].
        explore: lambda, the weight of the exploration loss, >= 0. The paper does not print its
            value; 0.5 is our choice (on validation data of the demo, 0.5 and 1 came out alike).
        label_smoothing: of the default cross-entropy, in [0, 1].
        exploit: False leaves the exploitation loss out, as the ablation of table 4 does; it is then
            reported as 0.
        router_supervision: weight of our addition to the paper's losses; 0 for none. The total gets
            ``router_supervision * router``, which pulls the router's weights w of a sample's K
            active experts towards what those got right. With l the losses of the sample's rows,
            taken as numbers, q = softmax(-l / router_temperature) and r = w / sum w,
            ``router = 1/N * sum over samples of KL(q || r)``. It reaches the generator only. K = 1
            leaves nothing to compare and is refused.
        router_temperature: tau > 0; the lower, the more the best of the K takes all.

    When ``torch.distributed`` is initialised, pbar is the mean over all ranks' batches; the
    gradient is right under DistributedDataParallel, which averages over the ranks.

    Raises:
        ValueError: a weight that is no finite number >= 0, a smoothing outside [0, 1] or given
            beside a ``task_loss``, a temperature that is not above 0.
    """

    def __init__(
        self,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        explore: float = 0.5,
        label_smoothing: float = 0.0,
        exploit: bool = True,
        router_supervision: float = 0.0,
        router_temperature: float = 1.0,
    ):
        super().__init__()
        check_weight("explore", explore)
        check_weight("router_supervision", router_supervision)
        check_temperature("router_temperature", router_temperature)
        check_smoothing(label_smoothing)
        if task_loss is not None and label_smoothing:
            raise ValueError(
                "label_smoothing: only for the default cross-entropy; use task_loss's own"
            )
        self.task_loss, self.explore, self.label_smoothing = task_loss, explore, label_smoothing
        self.exploit = exploit
        self.router_supervision, self.router_temperature = router_supervision, router_temperature

    @property
    def can_fuse(self) -> bool:
        """Whether the model may compute the exploit loss itself: it is the plain cross-entropy."""
        return self.task_loss is None and self.exploit

    def forward(
        self, out: PathwayOutput, y: Targets, sample_weight: Tensor | None = None
    ) -> PathwayLosses:
        """Losses of a ``PathwayOutput`` against targets y [N, ...].

        Args:
            out: what the model returned in training mode.
            y: targets, one a sample along dimension 0; of the default loss int64 classes [N, ...]
                or floats [N, C, ...], the probabilities of classes (mixup's and cutmix's targets);
                for a ``task_loss`` also a tuple or a dict of such tensors.
            sample_weight: [N] or None; multiplies the loss of each sample and of its rows (as
                importance weights of a replay buffer do), finite numbers; the divisor stays N.

        Raises:
            ValueError: an empty batch, y or sample_weight of another length than the batch,
                targets of another shape or dtype, classes out of range or weights that are not
                finite (on the CPU, where looking costs no wait), a task loss that does not return
                one value a sample, or a routing of K = 1 to supervise.
        """
        n = out.prediction.shape[0]
        check_some("out.prediction", out.prediction)
        check_lengths(y, n)
        if sample_weight is not None:
            _check_weights(sample_weight, n)
        if self.task_loss is None:
            check_classes("y", y, n, out.prediction)
            check_device("y", y, out.routing)
            if not y.is_floating_point():
                check_range("y", y, out.prediction)
        if self.router_supervision:
            check_router(out.routing, self.router_temperature)
        in_one_go = self.task_loss is None and sample_weight is None
        per_sample = None if in_one_go else self._per_sample(out.prediction, y)
        by_row = self._by_row(out, y, sample_weight)
        exploit = self._exploit(out, y, by_row, sample_weight) if self.exploit else None
        mean = mean_over_batch(out.routing.mean, n, everyone())
        if in_one_go:
            total, task, explore, per_sample = unchecked_total_loss(
                out.prediction, y, mean, exploit, self.explore, self.label_smoothing
            )
        else:
            task = (per_sample if sample_weight is None else per_sample * sample_weight).mean()
            explore = HF.exploration_loss(mean)
            total = task + self.explore * explore
            total = total if exploit is None else total + exploit
        exploit = _zero(task) if exploit is None else exploit
        if not self.router_supervision:
            return PathwayLosses(total, task, explore, exploit, _zero(task), per_sample)
        router = self._router(out, y, by_row, sample_weight)
        total = total + self.router_supervision * router
        return PathwayLosses(total, task, explore, exploit, router, per_sample)

    def _by_row(
        self, out: PathwayOutput, y: Targets, sample_weight: Tensor | None
    ) -> Tensor | None:
        """[R]: the loss of each row; None where an operation of ``functional`` computes it and all
        that is made of it."""
        if self.task_loss is None and sample_weight is None:
            return None
        if not (self.exploit or self.router_supervision):
            return None
        sample = sample_of_row(out.routing.rows, out.routing.k)
        return self._per_sample(out.expert_outputs, of_samples(y, sample))

    def _exploit(
        self, out: PathwayOutput, y: Targets, by_row: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor:
        routing = out.routing
        if by_row is None:
            fused = out.fused_exploit
            loss = None if fused is None else fused.loss(y, self.label_smoothing)
            if loss is None:
                loss = HF.exploit_loss(out.expert_outputs, routing, y, self.label_smoothing)
            return loss
        if sample_weight is not None:
            by_row = by_row * sample_weight.index_select(0, sample_of_row(routing.rows, routing.k))
        return by_row.sum() / routing.num_samples

    def _router(
        self, out: PathwayOutput, y: Targets, by_row: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor:
        routing, temperature = out.routing, self.router_temperature
        if by_row is None:
            fused, asked = out.fused_exploit, (y, self.label_smoothing, temperature)
            loss = None if fused is None else fused.router(*asked)
            if loss is None:
                loss = HF.router_loss(
                    out.expert_outputs, routing, y, temperature, self.label_smoothing
                )
            return loss
        return router_loss_of_rows(by_row, routing.weights, routing, temperature, sample_weight)

    def _per_sample(self, prediction: Tensor, y: Targets) -> Tensor:
        n = prediction.shape[0]
        if self.task_loss is not None:
            loss = self.task_loss(prediction, y)
            found = list(loss.shape) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            if found != [n]:
                raise ValueError(
                    f"task_loss: expected one loss a sample, [{n}], got {found}; "
                    'use reduction="none" and average over everything but dimension 0'
                )
            return loss
        return losses_of_samples(prediction, y, self.label_smoothing)

    def extra_repr(self) -> str:
        more = "" if self.exploit else ", exploit=False"
        if self.router_supervision:
            more += f", router_supervision={self.router_supervision}"
            more += f", router_temperature={self.router_temperature}"
        return f"explore={self.explore}, label_smoothing={self.label_smoothing}{more}"


def _check_weights(weights: Tensor, n: int) -> None:
    """Of the samples: whether they are finite is looked at where that costs no wait."""
    found = list(weights.shape) if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
    if found != [n]:
        raise ValueError(f"sample_weight: expected [{n}], got {found}")
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~weights.isfinite()
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"sample_weight: expected finite numbers, got {weights[first].item()} for sample "
                f"{first}"
            )


def _zero(like: Tensor) -> Tensor:
    """What a loss that is left out is reported as."""
    return like.new_zeros(())
