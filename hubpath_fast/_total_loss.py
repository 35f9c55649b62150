"""exploration_loss and total_loss, two of the public operations: see ``functional``."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks, _torch_ops


def exploration_loss(mean: Tensor) -> Tensor:
    """The negative entropy of the mean pathway weights, ``sum_i pbar_i log pbar_i`` (equation 4).

    Args:
        mean: [M], ``routing.mean``: p averaged over the batch, before top-K.

    Returns:
        A float32 (float64 for a float64 mean) scalar in [-log M, 0]. Its gradient is finite where
        a mean is zero.

    Raises:
        ValueError: mean is not a vector of floats.
    """
    _checks.check_mean(mean)
    return _torch_ops.exploration_loss(mean)


def total_loss(
    prediction: Tensor,
    target: Tensor,
    mean: Tensor,
    exploit: Tensor | None = None,
    explore: float = 0.5,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``task + explore * exploration_loss(mean) + exploit`` with its parts, in one go.

    What is left of the losses behind ``aggregate_with_exploit_loss``: a launch or two forward and
    one backward by the Triton kernels, where torch's operators launch 19 times for as little work.

    Args:
        prediction: [N, C, ...] logits.
        target: [N, ...] int64 classes, of which -100 adds nothing (the divisor stays N); or their
            probabilities [N, C, ...], any float dtype.
        mean: [M], ``routing.mean``.
        exploit: a scalar, as ``exploit_loss`` gives it; None for none.
        explore: lambda, the weight of the exploration loss: a finite number >= 0.
        label_smoothing: of the task's cross-entropy, in [0, 1].
        backend: None, "triton" or "torch". The kernels take classes [N]: maps and probabilities go
            to torch's implementation on every device, and "triton" is refused.

    Returns:
        ``(total, task, explore, losses)``: three scalars, the parts unweighted, and the task loss
        [N] of each sample, float32 (float64 where an argument is). Differentiable in prediction,
        mean, exploit, and, by torch's implementation, in probabilities.

    Raises:
        ValueError: arguments that do not fit; no samples or no positions, whose mean is no number;
            a class out of range, as for ``exploit_loss``.
    """
    _check(prediction, target, mean, exploit, explore, label_smoothing)
    return unchecked_total_loss(
        prediction, target, mean, exploit, explore, label_smoothing, backend
    )


def unchecked_total_loss(
    prediction: Tensor,
    target: Tensor,
    mean: Tensor,
    exploit: Tensor | None,
    explore: float,
    label_smoothing: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``total_loss`` of arguments that were checked: on a CPU to look at classes is a read each."""
    kernels_take_it = prediction.dim() == 2 and not target.is_floating_point()
    if not kernels_take_it:
        if backend == "triton":
            raise ValueError(
                'backend: "triton" has no total loss of maps or of class probabilities; leave it '
                'out or use "torch"'
            )
        backend = "torch"
    ops = _backends.choose(backend, prediction)
    return ops.total_loss(prediction, target, mean, exploit, explore, label_smoothing)


def _check(
    prediction: Tensor,
    target: Tensor,
    mean: Tensor,
    exploit: Tensor | None,
    explore: float,
    label_smoothing: float,
) -> None:
    if prediction.dim() < 2 or not prediction.is_floating_point():
        found = f"{prediction.dtype} {list(prediction.shape)}"
        raise ValueError(f"prediction: expected float logits [N, C, ...], got {found}")
    _checks.check_some("prediction", prediction)
    _checks.check_classes("target", target, prediction.shape[0], prediction)
    _checks.check_mean(mean)
    _checks.check_weight("explore", explore)
    _checks.check_smoothing(label_smoothing)
    if exploit is not None and (exploit.dim() != 0 or not exploit.is_floating_point()):
        found = f"{exploit.dtype} {list(exploit.shape)}"
        raise ValueError(f"exploit: expected a float scalar, got {found}")
    for name, tensor in (("target", target), ("mean", mean), ("exploit", exploit)):
        if tensor is not None and tensor.device != prediction.device:
            raise ValueError(
                f"{name}: is on {tensor.device}, the prediction on {prediction.device}; move one "
                "of them"
            )
    if not target.is_floating_point():
        _checks.check_range("target", target, prediction)
