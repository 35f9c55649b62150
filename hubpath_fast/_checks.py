"""Checks of the operations' arguments: each raises ValueError and names the argument."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .routing import Routing, is_full


def check_k(k: int, num_experts: int) -> None:
    """Raise ValueError unless k experts can be active in a hub of ``num_experts``."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= num_experts:
        raise ValueError(f"k: expected an integer in 1..{num_experts} (the experts), got {k!r}")


def is_finite_number(value: Any) -> bool:
    """Whether it is one of Python's or numpy's numbers: a tensor would have to be read."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and -math.inf < value < math.inf  # torch.compile traces no math.isfinite


def _shown(value: Any) -> str:
    return "a tensor; give its number, .item()" if isinstance(value, Tensor) else repr(value)


def check_weight(name: str, weight: Any) -> None:
    """Of a term of a loss."""
    if not (is_finite_number(weight) and weight >= 0):
        raise ValueError(f"{name}: expected a finite weight >= 0, got {_shown(weight)}")


def check_share(name: str, value: Any) -> None:
    if not (is_finite_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")


def check_some(name: str, x: Tensor) -> None:
    """Raise ValueError for [N, ...] of no samples, or of samples without elements."""
    if not x.numel():
        what = "batch" if not len(x) else "samples"
        raise ValueError(
            f"{name}: empty {what}, shape {list(x.shape)}; the mean of no losses is no number: "
            "every size must be >= 1"
        )


def check_float(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a float dtype, got {x.dtype}; convert it first")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape or x.dtype != other.dtype or x.device != other.device:
        raise ValueError(
            f"{name}: expected {other.dtype} {list(other.shape)} on {other.device} as "
            f"{other_name}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def check_device(name: str, x: Tensor, routing: Routing) -> None:
    if x.device != routing.rows.device:
        raise ValueError(
            f"{name}: is on {x.device}, the routing on {routing.rows.device}; move one of them"
        )


def check_no_gradient(name: str, x: Tensor, operation: str, instead: str = "detach it") -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, which {operation} does not give; {instead}")


def check_full(routing: Routing, what: str) -> None:
    """Losses and gradients are of all K rows of every sample."""
    if not is_full(routing):
        slots = routing.experts.numel()
        raise ValueError(
            f"routing: expected the N*K = {slots} rows of all slots for {what}, got "
            f"{routing.rows.numel()}; a routing with dropped slots is for predictions: call under "
            "torch.no_grad(), or route without a policy"
        )


def check_prediction(routing: Routing, *tensors: Tensor | None) -> None:
    """Nothing may require a gradient where slots were dropped."""
    if is_full(routing) or not torch.is_grad_enabled():
        return
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        check_full(routing, "gradients")


def check_gather(x: Tensor, routing: Routing, scale: Tensor | None, shift: Tensor | None) -> None:
    """What moves samples to rows takes: N samples as routed, and factors by expert and channel."""
    if x.dim() < 1 or x.shape[0] != routing.num_samples:
        raise ValueError(
            f"x: expected {routing.num_samples} samples as routed, got shape {list(x.shape)}"
        )
    check_device("x", x, routing)
    check_prediction(routing, x)
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise ValueError(f"x: expected a float dtype or uint8, got {x.dtype}; convert it first")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is None:
            continue
        expected = [routing.num_experts, x.shape[1] if x.dim() > 1 else "channels"]
        if list(tensor.shape) != expected or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected [experts, channels] = {expected} on {x.device}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
        check_float(name, tensor)
        check_no_gradient(name, tensor, "gather")


def check_outputs(outputs: Tensor, routing: Routing) -> None:
    num_rows = routing.rows.numel()
    if outputs.dim() < 2 or outputs.shape[0] != num_rows:
        total = "R = N*K =" if is_full(routing) else "R ="
        raise ValueError(
            f"outputs: expected [R, C, ...] with {total} {num_rows} rows as routed, "
            f"got {list(outputs.shape)}"
        )
    check_float("outputs", outputs)
    check_device("outputs", outputs, routing)


def check_classes(name: str, target: Tensor, num_samples: int, outputs: Tensor) -> None:
    """Targets of the cross-entropy of outputs [..., C, ...]: classes int64 [N, ...], or their
    probabilities [N, C, ...], of floats."""
    hard, soft = [num_samples, *outputs.shape[2:]], [num_samples, *outputs.shape[1:]]
    allowed = f"expected shape {hard} of int64 classes, or {soft} of float class probabilities"
    if not isinstance(target, Tensor):
        kind = type(target).__name__
        raise ValueError(f"{name}: {allowed}, got a {kind}; take torch.as_tensor({name})")
    found, floating = list(target.shape), target.is_floating_point()
    if found == (soft if floating else hard) and (floating or target.dtype == torch.int64):
        return
    if found == soft:
        hint = f"; of one-hot {target.dtype} take the classes, {name}.argmax(1), or {name}.float()"
    elif found == hard:
        hint = f"; convert classes to int64, {name}.long()"
    else:
        hint = ""
    raise ValueError(f"{name}: {allowed}, got {target.dtype} {found}{hint}")


def check_target(
    target: Tensor, outputs: Tensor, routing: Routing, label_smoothing: float, ignore_index: int
) -> None:
    """Targets of the exploit loss; their range only on the CPU, where looking costs no wait."""
    check_full(routing, "losses")
    check_some("outputs", outputs)
    check_classes("target", target, routing.num_samples, outputs)
    soft = target.is_floating_point()
    check_device("target", target, routing)
    check_smoothing(label_smoothing)
    if not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if soft:
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index: expected a negative number with class probabilities, in which no "
                f"index stands, got {ignore_index}; give such a sample a row of zeros instead"
            )
        return
    check_range("target", target, outputs, ignore_index)


def check_smoothing(label_smoothing: Any) -> None:
    if not (is_finite_number(label_smoothing) and 0 <= label_smoothing <= 1):
        found = _shown(label_smoothing)
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {found}")


def check_mean(mean: Tensor) -> None:
    if mean.dim() != 1 or not len(mean) or not mean.is_floating_point():
        found = f"{mean.dtype} {list(mean.shape)}"
        raise ValueError(f"mean: expected a float vector [M] with M >= 1, got {found}")


def check_router(routing: Routing, temperature: float, name: str = "temperature") -> None:
    """What the supervision of the router takes: at least two rows of a sample to compare."""
    check_temperature(name, temperature)
    if routing.k == 1:
        raise ValueError(
            "k: expected at least 2 for the supervision of the router, got 1; with one active "
            "expert a sample has nothing to compare: leave the supervision out or take a larger k"
        )


def check_temperature(name: str, temperature: Any) -> None:
    if not (is_finite_number(temperature) and temperature > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {_shown(temperature)}")


def check_range(name: str, target: Tensor, outputs: Tensor, ignore_index: int = -100) -> None:
    """Classes int64 [N, ...] of outputs [..., C, ...], where looking costs no wait."""
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass and one read in the usual case, where all are in range.
        low, high = torch.stack(target.aminmax()).tolist()
        if low >= 0 and high < outputs.shape[1]:
            return
        wrong = ((target < 0) | (target >= outputs.shape[1])) & (target != ignore_index)
        if wrong.any():
            raise ValueError(
                f"{name}: class {target[wrong][0].item()} is out of range for {outputs.shape[1]} "
                f"outputs; allowed are 0..{outputs.shape[1] - 1} and ignore_index={ignore_index}"
            )


def check_matrix(
    weight: Tensor, bias: Tensor | None, outputs: Tensor, routing: Routing, dtype: torch.dtype
) -> None:
    """The linear aggregator's parameters against the outputs [R, C, ...] and the hub. dtype: what
    the outputs are multiplied in."""
    width = routing.num_experts * outputs.shape[1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight: expected [C_out, M*C] = [any, {width}] for {routing.num_experts} experts of "
            f"{outputs.shape[1]} outputs, got {list(weight.shape)}"
        )
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias: expected [{weight.shape[0]}] as weight, got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_device(name, tensor, routing)
        if tensor.dtype != dtype:
            raise ValueError(
                f"{name}: expected {dtype} as outputs, got {tensor.dtype}; convert one of "
                "them, or use autocast"
            )
