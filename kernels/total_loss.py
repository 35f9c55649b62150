"""total_loss: the task's cross-entropy, the exploration loss, and the sum that is differentiated.

    task = (1/N) * sum_n CE(prediction[n], target[n])     explore = sum_i pbar_i log pbar_i
    total = task + lambda * explore + exploit             (equations 2, 4 and 5; _cross_entropy.py)

As torch's operators these are 10 launches forward and 9 backward, of a few numbers each, which cost
the host more than all else of a step's glue. Here they are one in either direction, or two forward
above _ALONE logits, where one program would take longer than a second launch. Nothing is atomic.

Shapes: N samples, M experts, C outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_DTYPE, accumulator, cdiv, next_power_of_2
from ._cross_entropy import cross_entropy, loss_gradient, sum_of_partials
from ._launch import Launch, Plan, apply, once_differentiable, register

_TILE, _WARPS = 4096, 8  # logits of one program's tile: 16 a lane
_ALONE = 4 * _TILE  # logits that one program takes, in about the time of a launch (estimated)
_PROGRAMS = 1024  # at most, forward, so that their sums are one tile
_IGNORED = -100  # the class of samples that add nothing, as in torch


@triton.jit
def _store_losses(
    task,
    total_ptr, task_ptr, explore_ptr,  # [], written
    mean_ptr,  # [M]
    exploit_ptr,  # [] or None
    weight,  # lambda, in float64 as everywhere: rounded once, to COMPUTE
    M: tl.constexpr, TINY: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    mean = tl.load(mean_ptr + m, mask=m < M, other=0.0).to(COMPUTE)
    explore = tl.sum(mean * tl.log(tl.maximum(mean, TINY)), axis=0)
    total = task + tl.full([], weight, dtype=COMPUTE) * explore
    if exploit_ptr is not None:
        total += tl.load(exploit_ptr).to(COMPUTE)
    tl.store(task_ptr, task)
    tl.store(explore_ptr, explore)
    tl.store(total_ptr, total)


@triton.jit(do_not_specialize=["num_samples", "share"])
def _total_loss(
    total_ptr, task_ptr, explore_ptr,  # [], written if ALONE
    partials_ptr,  # [programs], written unless ALONE
    losses_ptr,  # [N], written
    logsumexp_ptr,  # [N], written
    prediction_ptr,  # [N, C]
    target_ptr,  # [N]
    mean_ptr,  # [M]
    exploit_ptr,  # [] or None
    num_samples,
    share,
    weight: tl.float64,
    ignore_index,
    C: tl.constexpr, M: tl.constexpr, SMOOTHING: tl.constexpr, TINY: tl.constexpr,
    COMPUTE: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: shares of the samples. A program leaves its samples' losses and their sum over N; one
    that is ALONE also does what is left."""
    first = tl.program_id(0).to(tl.int64) * share
    task = tl.zeros([BLOCK_T], dtype=COMPUTE)
    for start in range(first, tl.minimum(first + share, num_samples), BLOCK_T):
        n = start + tl.arange(0, BLOCK_T)
        mask_t = n < num_samples
        y = tl.load(target_ptr + n, mask=mask_t, other=0)
        loss, logsumexp = cross_entropy(
            prediction_ptr, n * C, 1, y, mask_t, ignore_index, C, SMOOTHING, COMPUTE,
            BLOCK_T, BLOCK_C,
        )  # fmt: skip
        tl.store(losses_ptr + n, loss, mask=mask_t)
        tl.store(logsumexp_ptr + n, logsumexp, mask=mask_t)
        task += loss
    sum_task = tl.sum(task, axis=0) / num_samples
    if ALONE:
        _store_losses(
            sum_task, total_ptr, task_ptr, explore_ptr, mean_ptr, exploit_ptr, weight,
            M, TINY, COMPUTE, BLOCK_M,
        )  # fmt: skip
    else:
        tl.store(partials_ptr + tl.program_id(0), sum_task)


@triton.jit(do_not_specialize=["num_partials"])
def _add_losses(
    total_ptr, task_ptr, explore_ptr,  # [], written
    partials_ptr,  # [num_partials]
    mean_ptr,  # [M]
    exploit_ptr,  # [] or None
    num_partials,
    weight: tl.float64,
    M: tl.constexpr, TINY: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (1,). What is left where several programs share the samples."""
    task = sum_of_partials(partials_ptr, num_partials, COMPUTE, BLOCK_P)
    _store_losses(
        task, total_ptr, task_ptr, explore_ptr, mean_ptr, exploit_ptr, weight,
        M, TINY, COMPUTE, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _scalar(ptr, COMPUTE: tl.constexpr):
    """What it points at; 0 for None."""
    value = tl.full([], 0.0, dtype=COMPUTE)
    if ptr is not None:
        value += tl.load(ptr).to(COMPUTE)
    return value


@triton.jit(do_not_specialize=["num_samples"])
def _total_loss_backward(
    d_prediction_ptr,  # [N, C], written
    d_mean_ptr,  # [M], written
    d_total_ptr, d_task_ptr, d_explore_ptr,  # [], each or None
    d_losses_ptr,  # [N] or None
    prediction_ptr,  # [N, C]
    logsumexp_ptr,  # [N]
    target_ptr,  # [N]
    mean_ptr,  # [M]
    num_samples,
    weight: tl.float64,
    ignore_index,
    C: tl.constexpr, M: tl.constexpr, SMOOTHING: tl.constexpr, TINY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of [N, C], channels first. The first program writes d_mean, too."""
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_t = n < num_samples
    mask = mask_t[:, None] & (c < C)[None, :]
    offs = n[:, None] * C + c[None, :]
    y = tl.load(target_ptr + n, mask=mask_t, other=0)
    logsumexp = tl.load(logsumexp_ptr + n, mask=mask_t, other=0.0)
    x = tl.load(prediction_ptr + offs, mask=mask, other=0.0).to(COMPUTE)
    d_total = _scalar(d_total_ptr, COMPUTE)
    d_loss = tl.zeros([BLOCK_T], dtype=COMPUTE)
    d_loss += (d_total + _scalar(d_task_ptr, COMPUTE)) / num_samples
    if d_losses_ptr is not None:
        d_loss += tl.load(d_losses_ptr + n, mask=mask_t, other=0.0).to(COMPUTE)
    d_x = loss_gradient(x, logsumexp[:, None], y[:, None], c[None, :], ignore_index, C, SMOOTHING)
    tl.store(d_prediction_ptr + offs, d_loss[:, None] * d_x, mask=mask)

    if pid == 0:
        m = tl.arange(0, BLOCK_M)
        mean = tl.load(mean_ptr + m, mask=m < M, other=1.0).to(COMPUTE)
        # Not of a maximum, which would make a number of a NaN.
        slope = tl.log(tl.where(mean < TINY, TINY, mean)) + tl.where(mean < TINY, 0.0, 1.0)
        d_explore = d_total * tl.full([], weight, dtype=COMPUTE) + _scalar(d_explore_ptr, COMPUTE)
        tl.store(d_mean_ptr + m, d_explore * slope, mask=m < M)


def _tile(channels: int) -> tuple[int, int]:
    """(BLOCK_T, BLOCK_C)."""
    block_c = min(next_power_of_2(channels), 1024)
    return _TILE // block_c, block_c


def _arguments(prediction, target, mean, label_smoothing, weight, compute) -> dict:
    """What forward and backward are both launched with."""
    block_t, block_c = _tile(prediction.shape[1])
    return {
        "prediction_ptr": prediction,
        "target_ptr": target,
        "mean_ptr": mean,
        "num_samples": prediction.shape[0],
        "weight": weight,
        "ignore_index": _IGNORED,
        "C": prediction.shape[1],
        "M": mean.shape[0],
        "SMOOTHING": label_smoothing,
        "TINY": torch.finfo(mean.dtype).tiny,
        "COMPUTE": TRITON_DTYPE[compute],
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
        "BLOCK_M": next_power_of_2(mean.shape[0]),
        "num_warps": _WARPS,
    }


def plan_forward(prediction, target, mean, exploit, label_smoothing, weight) -> Plan:
    """(total, task, explore, the samples' losses, their logsumexp)."""
    results = _forward_fake(prediction, target, mean, exploit, label_smoothing, weight)
    total, task, explore, losses, logsumexp = results
    n, channels = prediction.shape
    block_t, _ = _tile(channels)
    alone = n * channels <= _ALONE
    share = cdiv(cdiv(n, block_t), 1 if alone else _PROGRAMS) * block_t
    programs = cdiv(n, share)
    partials = None if alone else losses.new_empty(programs)
    left = {"total_ptr": total, "task_ptr": task, "explore_ptr": explore}
    left |= {"partials_ptr": partials, "exploit_ptr": exploit}
    arguments = _arguments(prediction, target, mean, label_smoothing, weight, losses.dtype)
    first = Launch(
        _total_loss,
        programs,
        **left,
        **arguments,
        losses_ptr=losses,
        logsumexp_ptr=logsumexp,
        share=share,
        ALONE=alone,
        # Triton drops device assertions unless debug is on; debug alone would also check every
        # integer operation for overflow.
        debug=True,
        sanitize_overflow=False,
    )
    if alone:
        return Plan(results, [first])
    shared = ("mean_ptr", "weight", "M", "TINY", "COMPUTE", "BLOCK_M")
    second = Launch(
        _add_losses,
        1,
        **left,
        **{name: arguments[name] for name in shared},
        num_partials=programs,
        BLOCK_P=_PROGRAMS,
    )
    return Plan(results, [first, second])


def _forward_fake(prediction, target, mean, exploit, label_smoothing, weight):
    dtypes = [t.dtype for t in (prediction, mean, exploit) if t is not None]
    sizes = ((), (), (), prediction.shape[:1], prediction.shape[:1])
    return tuple(prediction.new_empty(size, dtype=accumulator(*dtypes)) for size in sizes)


def plan_backward(
    prediction, logsumexp, target, mean, label_smoothing,
    d_total, d_task, d_explore, d_losses, weight,
) -> Plan:  # fmt: skip
    d_prediction, d_mean = torch.empty_like(prediction), torch.empty_like(mean)
    arguments = _arguments(prediction, target, mean, label_smoothing, weight, logsumexp.dtype)
    n, channels = prediction.shape
    launch = Launch(
        _total_loss_backward,
        cdiv(n, arguments["BLOCK_T"]) * cdiv(channels, arguments["BLOCK_C"]),
        **arguments,
        d_prediction_ptr=d_prediction,
        d_mean_ptr=d_mean,
        d_total_ptr=d_total,
        d_task_ptr=d_task,
        d_explore_ptr=d_explore,
        d_losses_ptr=d_losses,
        logsumexp_ptr=logsumexp,
    )
    return Plan((d_prediction, d_mean), [launch])


def _backward_settle(*arguments):
    """A sum sends one number back to all samples, repeated by a stride of 0."""
    *rest, d_losses, weight = arguments
    return *rest, None if d_losses is None else d_losses.contiguous(), weight


total_loss_forward = register(
    "total_loss_forward(Tensor prediction, Tensor target, Tensor mean, Tensor? exploit,"
    " float label_smoothing, float weight)"
    " -> (Tensor total, Tensor task, Tensor explore, Tensor losses, Tensor logsumexp)",
    plan_forward,
    _forward_fake,
    numbers=1,
)
total_loss_backward = register(
    "total_loss_backward(Tensor prediction, Tensor logsumexp, Tensor target, Tensor mean,"
    " float label_smoothing,"
    " Tensor? d_total, Tensor? d_task, Tensor? d_explore, Tensor? d_losses, float weight)"
    " -> (Tensor d_prediction, Tensor d_mean)",
    plan_backward,
    lambda prediction, logsumexp, target, mean, *_: (
        torch.empty_like(prediction),
        torch.empty_like(mean),
    ),
    _backward_settle,
    numbers=1,
)


class _TotalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, target, mean, exploit, weight, label_smoothing):
        *results, logsumexp = total_loss_forward(
            prediction, target, mean, exploit, label_smoothing, weight
        )
        ctx.save_for_backward(prediction, logsumexp, target, mean)
        ctx.options = weight, label_smoothing
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, d_task, d_explore, d_losses):
        given = d_total, d_task, d_explore, d_losses
        weight, label_smoothing = ctx.options
        d_prediction, d_mean = total_loss_backward(
            *ctx.saved_tensors, label_smoothing, *given, weight
        )
        # No gradient is not one of zeros, which an optimizer would step by.
        if d_total is None and d_task is None and d_losses is None:
            d_prediction = None
        if d_total is None and d_explore is None:
            d_mean = None
        d_exploit = d_total if ctx.needs_input_grad[3] else None  # autograd takes none for no loss
        return d_prediction, None, d_mean, d_exploit, None, None


def total_loss(
    prediction: Tensor,
    target: Tensor,
    mean: Tensor,
    exploit: Tensor | None,
    weight: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(total, task, explore, losses)``: the three scalars, and the task loss [N] of each sample.

    Args:
        prediction: [N, C] float16, bfloat16, float32 (float64 too under the interpreter).
        target: [N] int64 classes in [0, C); -100 adds nothing, and still counts in N. Anything else
            is a device-side assertion on CUDA, as in torch, and is never used as an address.
        mean: [M], p averaged over the batch, float32 or float64.
        exploit: a scalar that the total takes in; None for none.
        weight: lambda, of the exploration loss in the total.
        label_smoothing: of the cross-entropy, in [0, 1].

    Returns:
        All float32 (float64 where anything is). One launch forward, or two of many logits; one
        backward. Differentiable in prediction, mean and exploit.
    """
    return apply(
        _TotalLoss,
        prediction.contiguous(),
        target.contiguous(),
        mean.contiguous(),
        exploit,
        float(weight),
        float(label_smoothing),
    )
