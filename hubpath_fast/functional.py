"""The public operations of Hub-Pathway: one definition each, several implementations behind it.

    routing = noisy_topk(clean, noise, k, eps)      equations 1 and 3, and the plan to move rows
    rows    = gather(x, routing)                    [N, ...] -> [R, ...], in expert order
    gather_into(out, x, routing)                    the same, into static input buffers
    concat  = combine(outputs, routing)             [R, C, ...] -> [N, M*C, ...], weighted
    y       = aggregate(outputs, routing, W, b)     F.linear(combine(outputs), W, b), in one go
    loss    = exploit_loss(outputs, routing, y)     equation 5
    loss    = router_loss(outputs, routing, y)      supervision of the router, ours
    loss    = exploration_loss(routing.mean)        equation 4
    total   = total_loss(prediction, y, routing.mean, exploit)   the losses' sum, and its parts
    y       = masked_batch_norm(x, count, W, b)     BatchNorm over the valid rows of a padded group

``backend`` picks the implementation: "triton" (the fused kernels, on CUDA tensors or under Triton's
interpreter), "torch" (vectorised PyTorch, any device), or None: Triton for CUDA tensors where it
imports, torch elsewhere. Arguments are checked here, once for all backends, before anything is
launched and without waiting for a device.

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, C outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._batch_norm import masked_batch_norm  # noqa: F401  one of the operations
from ._checks import (
    check_device,
    check_float,
    check_gather,
    check_k,
    check_like,
    check_matrix,
    check_no_gradient,
    check_outputs,
    check_prediction,
    check_router,
    check_target,
)
from ._noise_draw import NoiseDraw, check_noise_draw
from ._total_loss import exploration_loss, total_loss  # noqa: F401  two more of them
from .routing import Routing

BACKENDS = _backends.BACKENDS


def noisy_topk(
    clean: Tensor,
    noise: Tensor,
    k: int,
    eps: Tensor | NoiseDraw | str | None = None,
    renormalize: bool = False,
    backend: str | None = None,
) -> Routing:
    """Noisy softmax over the experts, the K most probable of each sample, and the row plan.

    ``z = clean + eps * softplus(noise)``, ``p = softmax(z)`` in float32 (float64 for float64
    input); the K largest p are active, the lowest index first among equals, and their weights are
    p itself (equations 1 and 3 of the paper).

    Args:
        clean: [N, M] scores of the experts, any float dtype.
        noise: [N, M] raw noise scales (softplus is applied here), same dtype and device.
        k: K, active experts per sample, 1..M.
        eps: [N, M] standard normal noise; None for no noise (evaluation); "draw" to draw it
            inside, from torch's generator of that device; or a ``NoiseDraw``, which makes it a
            function of a seed and of the samples' numbers alone.
        renormalize: divide the K weights by their sum. Not in the paper; off by default.
        backend: None, "triton" or "torch".

    Returns:
        A ``Routing``; gradients flow from ``weights`` and ``mean`` to ``clean`` and ``noise``.

    Raises:
        ValueError: a wrong shape, dtype, device, k or backend; an empty batch; an eps that
            requires a gradient, or a ``NoiseDraw`` out of range or in a captured graph.
    """
    if clean.dim() != 2:
        raise ValueError(f"clean: expected scores of shape [N, M], got {list(clean.shape)}")
    n, num_experts = clean.shape
    if n == 0 or num_experts == 0:
        raise ValueError(
            f"clean: empty batch or hub, shape {list(clean.shape)}; N and M must be >= 1"
        )
    check_float("clean", clean)
    check_like("noise", noise, "clean", clean)
    if isinstance(eps, Tensor):
        check_float("eps", eps)
        if eps.shape != clean.shape or eps.device != clean.device:
            raise ValueError(
                f"eps: expected shape {list(clean.shape)} on {clean.device} as clean, "
                f"got {list(eps.shape)} on {eps.device}"
            )
        check_no_gradient("eps", eps, "noisy_topk")
    elif isinstance(eps, NoiseDraw):
        check_noise_draw(eps)
        if clean.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "eps: a captured graph would repeat the noise of a NoiseDraw at each replay; give "
                '"draw", or a tensor that is filled before each'
            )
    elif eps is not None and eps != "draw":
        raise ValueError(f'eps: expected a tensor, a NoiseDraw, None or "draw", got {eps!r}')
    check_k(k, num_experts)
    ops = _backends.choose(backend, clean)
    return Routing(*ops.noisy_topk(clean, noise, eps, k, renormalize))


def gather(
    x: Tensor,
    routing: Routing,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    """Copy each sample to the rows of its K experts, normalised as each expert wants it.

    Args:
        x: [N, ...], any float dtype or uint8.
        routing: the plan.
        scale: [M, channels] or None: row r of expert i becomes ``x * scale[i] + shift[i]``, with
            channels along dimension 1, computed in float32 and rounded once.
        shift: [M, channels] or None.
        dtype: of the result; default x's own, or float32 where uint8 is scaled or shifted.
        memory_format: ``torch.contiguous_format`` or, for four dimensions, ``torch.channels_last``;
            default x's own.
        backend: None, "triton" or "torch".

    Returns:
        [R, ...], rows by expert, then by sample. Differentiable in x.

    Raises:
        ValueError: x and routing disagree on N, a wrong scale or shift or one that requires a
            gradient, an unsupported dtype.
    """
    check_gather(x, routing, scale, shift)
    if dtype is None:
        affine = scale is not None or shift is not None
        dtype = torch.float32 if affine and not x.is_floating_point() else x.dtype
    if memory_format is None:
        memory_format = own_memory_format(x)
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"memory_format: expected torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    if memory_format == torch.channels_last and x.dim() != 4:
        raise ValueError(f"memory_format: channels_last needs x [N, C, H, W], got {list(x.shape)}")
    ops = _backends.choose(backend, x)
    return ops.gather(x, routing, scale, shift, dtype, memory_format)


def gather_into(
    out: Tensor,
    x: Tensor,
    routing: Routing,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
    most_rows: int | None = None,
) -> None:
    """``gather`` into static input buffers: row j of expert i goes to ``out[i * capacity + j]``.

    So an expert's rows lie at an address that no other expert's count moves, which is known before
    the counts are: a captured graph reads them there.

    Args:
        out: [M * capacity, ...] with capacity >= most_rows, contiguous or channels last; its dtype
            and layout are the rows'. What lies beyond an expert's rows is left as it is.
        x, routing, scale, shift, backend: as of ``gather``.
        most_rows: that any expert gets of these samples, which is not checked: one with more
            overwrites the next one's. None: N, which no routing exceeds.

    Not differentiable: gradients of x need ``gather``.

    Raises:
        ValueError: as ``gather``; an x that requires a gradient, a wrong shape or layout of out.
    """
    check_gather(x, routing, scale, shift)
    check_no_gradient("x", x, "gather_into", "use gather")
    m, n = routing.num_experts, routing.num_samples
    most = n if most_rows is None else most_rows
    check_device("out", out, routing)
    if out.dim() != x.dim() or out.shape[1:] != x.shape[1:] or len(out) % m or len(out) < m * most:
        least = f"N={n}" if most_rows is None else f"most_rows={most}"
        raise ValueError(
            f"out: expected [{m} * capacity, ...] rows of {list(x.shape[1:])} with a capacity of "
            f"at least {least}, got shape {list(out.shape)}"
        )
    if not out.is_floating_point() and out.dtype != x.dtype:
        raise ValueError(f"out: expected a float dtype or x's own, {x.dtype}, got {out.dtype}")
    if not out.is_contiguous(memory_format=own_memory_format(out)):
        raise ValueError(
            f"out: expected a contiguous or channels-last tensor, got strides {out.stride()}"
        )
    ops = _backends.choose(backend, x)
    ops.gather_into(out, x, routing, scale, shift)


def combine(outputs: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
    """The concatenation of all experts' weighted outputs, zero where an expert is inactive.

    ``concat[n, i*C + c, ...] = w[n, i] * outputs[row of (n, i), c, ...]``: the argument of the
    aggregator A in equation 2.

    Args:
        outputs: [R, C, ...] of the experts, in row order.
        routing: the plan and the weights.
        backend: None, "triton" or "torch".

    Returns:
        [N, M*C, ...], outputs' dtype. Differentiable in outputs and ``routing.weights``.

    Raises:
        ValueError: outputs that do not fit the routing.
    """
    check_outputs(outputs, routing)
    check_prediction(routing, outputs, routing.weights)
    ops = _backends.choose(backend, outputs)
    return ops.combine(outputs, routing.weights, routing)


def aggregate(
    outputs: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """The linear aggregator on rows: ``F.linear(combine(outputs), weight, bias)``.

    The concatenation is not built where the grouped form is faster. Maps [R, C, ...] are
    aggregated at every position alike (a 1 x 1 convolution), in their layout; of large ones, on the
    CPU and by the Triton kernels, nothing of their size is made or kept beside their gradient.

    Args:
        outputs: [R, C, ...] of the experts, in row order.
        routing: the plan and the weights.
        weight: [C_out, M*C].
        bias: [C_out] or None.
        backend: None, "triton" or "torch".

    Returns:
        [N, C_out, ...]. Differentiable in outputs, ``routing.weights``, weight and bias.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    check_outputs(outputs, routing)
    check_prediction(routing, outputs, routing.weights, weight, bias)
    dtype, weight, bias = _autocast(outputs, weight, bias)
    check_matrix(weight, bias, outputs, routing, dtype)
    if outputs.dim() == 2:  # maps are cast where they are read, never all of them
        outputs = outputs.to(dtype)
    ops = _backends.choose(backend, outputs)
    return ops.aggregate(outputs, routing.weights, routing, weight, bias)


def exploit_loss(
    outputs: Tensor,
    routing: Routing,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Every active expert's own cross-entropy: ``1/N * sum over rows`` (equation 5).

    Args:
        outputs: [R, C, ...] logits of the experts, in row order.
        routing: the plan.
        target: [N, ...] int64 classes of the samples; or their probabilities [N, C, ...], any float
            dtype, as mixup and distillation have them (taken as they are: rows need not sum to 1).
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        ignore_index: rows of samples with this target add nothing; the divisor stays N. Of no
            meaning, and negative, with probabilities.
        backend: None, "triton" or "torch". The kernels read classes: probabilities go to torch's
            implementation on every device, and "triton" is refused.

    Returns:
        A float32 (float64 for float64 outputs) scalar. Differentiable in outputs, and in
        probabilities.

    Raises:
        ValueError: arguments that do not fit; a class out of range (on the CPU; on a GPU looking
            would cost a wait, and a device-side assertion takes its place).
    """
    check_outputs(outputs, routing)
    check_target(target, outputs, routing, label_smoothing, ignore_index)
    ops = _backends.choose(_loss_backend(backend, target), outputs)
    return ops.exploit_loss(outputs, routing, target, label_smoothing, ignore_index)


def router_loss(
    outputs: Tensor,
    routing: Routing,
    target: Tensor,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """How far the router's weights are from what its experts got right: ``1/N * sum KL(q || r)``.

    Of a sample's K rows, ``q = softmax(-l / temperature)`` of their cross-entropies l, which are
    taken as numbers, and ``r_j = w_j / sum_j w_j``, the weights of these K alone. Our addition, not
    in the paper.

    Args:
        outputs: [R, C, ...] logits of the experts, in row order.
        routing: the plan and the weights; K >= 2.
        target: as of ``exploit_loss``. A sample that is ignored (class -100) has equal losses.
        temperature: tau > 0: the lower, the more the best row takes all.
        label_smoothing: of the cross-entropies.
        backend: as of ``exploit_loss``.

    Returns:
        A float32 (float64 for float64) scalar >= 0. Differentiable in ``routing.weights`` alone. A
        weight below the smallest normal number counts as that number, so that value and gradient
        stay finite.

    Raises:
        ValueError: arguments that do not fit; K = 1, where there is nothing to compare.
    """
    check_outputs(outputs, routing)
    check_target(target, outputs, routing, label_smoothing, -100)
    check_router(routing, temperature)
    ops = _backends.choose(_loss_backend(backend, target), outputs)
    return ops.router_loss(outputs, routing.weights, routing, target, temperature, label_smoothing)


def combine_with_exploit_loss(
    outputs: Tensor,
    routing: Routing,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str | None = None,
    router_temperature: float | None = None,
) -> tuple[Tensor, ...]:
    """``(combine(...), exploit_loss(...))`` with one backward for both.

    Arguments, results and errors are those of the two. The Triton kernels then read each row's
    output once and write its gradient once, where autograd would add up two; with class
    probabilities as target only ``combine`` is theirs.

    With a ``router_temperature`` the third result is ``router_loss`` at that temperature, of the
    row losses that are at hand.
    """
    _check_losses(outputs, routing, target, label_smoothing, ignore_index, router_temperature)
    loss, temperature = (target, label_smoothing, ignore_index), router_temperature
    if target.is_floating_point():
        losses = _losses_of_probabilities(backend, outputs, routing, loss, temperature)
        return combine(outputs, routing, backend), *losses
    ops = _backends.choose(backend, outputs)
    return ops.combine_with_exploit_loss(
        outputs, routing.weights, routing, *loss, temperature=temperature
    )


def aggregate_with_exploit_loss(
    outputs: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str | None = None,
    router_temperature: float | None = None,
) -> tuple[Tensor, ...]:
    """``(aggregate(...), exploit_loss(...))`` with one backward for both.

    Arguments, results and errors are those of the two; see ``combine_with_exploit_loss``, also for
    ``router_temperature``.
    """
    _check_losses(outputs, routing, target, label_smoothing, ignore_index, router_temperature)
    loss, temperature = (target, label_smoothing, ignore_index), router_temperature
    if target.is_floating_point():
        losses = _losses_of_probabilities(backend, outputs, routing, loss, temperature)
        return aggregate(outputs, routing, weight, bias, backend), *losses
    dtype, weight, bias = _autocast(outputs, weight, bias)
    check_matrix(weight, bias, outputs, routing, dtype)
    ops = _backends.choose(backend, outputs)
    # The outputs as they came: autocast is the aggregation's, not the loss's.
    return ops.aggregate_with_exploit_loss(
        outputs, routing.weights, routing, weight, bias, *loss, temperature=temperature
    )


def _loss_backend(name: str | None, target: Tensor) -> str | None:
    """The one that computes a loss against this target."""
    if not target.is_floating_point():
        return name
    if name == "triton":
        raise ValueError(
            'backend: "triton" has no loss against class probabilities; leave it out or use '
            '"torch", or give classes [N, ...] as target'
        )
    return "torch" if name is None else name


def _check_losses(
    outputs: Tensor, routing: Routing, target: Tensor, label_smoothing: float, ignore_index: int,
    router_temperature: float | None,
) -> None:  # fmt: skip
    check_outputs(outputs, routing)
    check_target(target, outputs, routing, label_smoothing, ignore_index)
    if router_temperature is not None:
        check_router(routing, router_temperature, "router_temperature")


def _losses_of_probabilities(
    backend: str | None, outputs: Tensor, routing: Routing, loss: tuple, temperature: float | None
) -> tuple[Tensor, ...]:
    """Against class probabilities, the first of ``loss``: torch's on every device."""
    ops = _backends.choose(_loss_backend(backend, loss[0]), outputs)
    return ops.losses_of_rows(outputs, routing.weights, routing, *loss, temperature)


def _autocast(
    outputs: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[torch.dtype, Tensor, Tensor | None]:
    """What autocast does to the arguments of a linear layer: of the outputs, their dtype there."""
    dtype = autocast_dtype(outputs.device.type)
    if dtype is None:
        return outputs.dtype, weight, bias
    weight, bias = (
        t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (weight, bias)
    )
    return outputs.dtype if outputs.dtype == torch.float64 else dtype, weight, bias


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on this type of device; None where it is off, or there is none."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def own_memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for images [N, C, H, W] that lie so in memory, else contiguous_format."""
    channels_last = (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    return torch.channels_last if channels_last else torch.contiguous_format
