"""Results of BatchNorm layers that are computed when they are used, with what follows them.

A masked BatchNorm costs one pass less for each operation that it takes in: the activation after it,
and the residual sum. What follows a layer is known to the code of its block only, of which there
are hundreds. So the layer returns a tensor that holds no values: ``relu`` of it is another such,
that remembers the ReLU; ``+`` remembers the residual; whatever else is done with it computes it
first, in one ``functional.masked_batch_norm``.

What must not go wrong:

- A layer's running statistics move once with each call, however many results are made of it, also
  if none is ever used: ``Call.finish``.
- Operations in place change the tensor itself, for all who hold it, but none that was made of it
  before: a ``Recipe`` is never changed, only replaced.
- What a recipe reads may be written to before it is computed. That is an error, as it is where
  autograd needs the values. (Not a TypeError: operators make "unsupported operand" of it.)
- Code that does not ask ``__torch_function__`` (``autograd.Function``, TorchScript) would find no
  values, or lose the gradient. ``may_defer`` keeps out of such places where it can tell; else the
  first gets an error, and the second a leaf that requires a gradient, which captures refuse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional as HF
from .. import torch_private


class Call:
    """One call of a BatchNorm layer on padded rows x: the arguments of ``masked_batch_norm``."""

    def __init__(
        self,
        x: Tensor,
        count: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | None,
        eps: float,
        num_batches_tracked: Tensor | None,
    ):
        self.x, self.count, self.weight, self.bias = x, count, weight, bias
        self.running = running_mean, running_var
        self.momentum, self.eps, self.num_batches_tracked = momentum, eps, num_batches_tracked
        self.moved = False  # whether the running statistics are

    def compute(self, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        # Running statistics that have moved are still read, for a single row: they stand still.
        momentum, tracked = (0.0, None) if self.moved else (self.momentum, self.num_batches_tracked)
        self.moved = True
        return HF.masked_batch_norm(
            self.x, self.count, self.weight, self.bias, *self.running, momentum, self.eps,
            activation, residual, num_batches_tracked=tracked,
        )  # fmt: skip

    def finish(self) -> None:
        """Moves the running statistics, if nothing has yet."""
        if not self.moved and self.running[0] is not None:
            with torch.no_grad():
                self.compute()


class Recipe(NamedTuple):
    """How a result is made. reads: tensors, each with the version that it must still have."""

    call: Call
    reads: tuple[tuple[Tensor, int], ...]
    residual: Tensor | None = None
    activation: str | None = None

    @property
    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor, _ in self.reads)

    def compute(self) -> Tensor:
        for tensor, version in self.reads:
            if tensor._version != version:
                raise RuntimeError(
                    f"writes to a tensor {list(tensor.shape)} in place that a BatchNorm layer, or "
                    "a sum with its result, had read"
                )
        hooks = contextlib.nullcontext()
        if torch_private.has_saved_tensors_hooks():
            # A checkpoint's, if this was an argument of what it calls again: no part of that.
            hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
        with torch.enable_grad(), hooks:
            return self.call.compute(self.activation, self.residual)


class Deferred(Tensor):
    """A tensor with a shape, a dtype and a device; its values are computed when they are needed."""

    _recipe: Recipe | None  # None: computed
    _value: Tensor | None

    @staticmethod
    def __new__(cls, recipe: Recipe) -> Deferred:
        x = recipe.call.x
        new = Tensor._make_wrapper_subclass(
            cls, x.shape, dtype=x.dtype, device=x.device, requires_grad=recipe.requires_grad
        )
        new._recipe, new._value = recipe, None
        return new

    def pending(self) -> Recipe | None:
        """How it will be computed; None once it was."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.grad_fn is not None:
                raise RuntimeError(
                    "an autograd.Function returned a BatchNorm layer's result that was not "
                    "computed yet"
                )
        return self._recipe

    def value(self) -> Tensor:
        recipe = self.pending()
        if recipe is not None:
            self._value, self._recipe = recipe.compute(), None
        return self._value

    def become(self, recipe: Recipe) -> Deferred:
        self._recipe = recipe
        with torch._C.DisableTorchFunctionSubclass():
            self.requires_grad_(recipe.requires_grad)
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in TAKEN_IN and torch.is_grad_enabled():
            found = TAKEN_IN[func](*args, **kwargs)
            if found is not None:
                return found
        return func(*settled(args), **settled(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(
            f"{func} reads a BatchNorm layer's result that was not computed yet: it was called "
            "past torch's functions"
        )


def may_defer(x: Tensor) -> bool:
    """Whether what becomes of a layer's result can be followed, and its gradient with it."""
    return (
        # Without gradients: a checkpoint's first run, whose results leave an autograd.Function.
        torch.is_grad_enabled()
        # Recomputation: what a checkpoint computes the second time must be what it did the first.
        and not torch_private.in_backward()
        and not torch_private.has_saved_tensors_hooks()
        and not torch_private.has_modes()
        and not torch_private.has_function_transforms()
        and type(x) in PLAIN
        and not x.is_inference()
    )


def deferred(call: Call) -> Deferred:
    """The call's result, to be computed when it is used. Only where ``may_defer``."""
    reads = [call.x, *(tensor for tensor in (call.weight, call.bias) if tensor is not None)]
    return Deferred(Recipe(call, tuple((tensor, tensor._version) for tensor in reads)))


def settled(found: object) -> object:
    """The same with every deferred tensor in it computed: in tuples, lists and dictionaries."""
    if isinstance(found, Deferred):
        return found.value()
    if isinstance(found, dict):
        return {key: settled(value) for key, value in found.items()}
    if isinstance(found, tuple) and hasattr(found, "_fields"):
        return type(found)(*map(settled, found))
    if type(found) in (tuple, list):
        return type(found)(map(settled, found))
    return found


PLAIN = (Tensor, nn.Parameter)

METADATA = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,
    Tensor.layout.__get__, Tensor.requires_grad.__get__, Tensor.is_cuda.__get__, Tensor.size,
    Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference, Tensor.get_device,
    Tensor.element_size, torch.numel, torch.is_floating_point, torch.is_complex,
}  # fmt: skip


def _activated(activation: str, in_place: bool, *args: object, **kwargs: object) -> Tensor | None:
    """The activation of a deferred tensor, deferred; None: not this one's."""
    if len(args) != 1:
        return None
    [x] = args
    recipe = x.pending()
    if recipe is None or recipe.activation is not None:
        return None
    recipe = recipe._replace(activation=activation)
    return x.become(recipe) if in_place or kwargs.get("inplace") else Deferred(recipe)


def _hardtanh(*args: object, min_val: float = -1, max_val: float = 1, **kwargs: object):
    return _activated("relu6", False, *args, **kwargs) if (min_val, max_val) == (0, 6) else None


def _summed(in_place: bool, *args: object, **kwargs: object) -> Tensor | None:
    """The sum of a deferred tensor with another one, deferred; None: not these."""
    if len(args) != 2 or kwargs:
        return None
    left, right = args
    if left is right:
        return None
    for taker, other in ((left, right), (right, left)):
        if _takes(taker, other):
            residual, recipe = settled(other), taker.pending()
            recipe = recipe._replace(
                residual=residual, reads=(*recipe.reads, (residual, residual._version))
            )
            return taker.become(recipe) if in_place else Deferred(recipe)
        if in_place:  # into the left one only
            return None
    return None


def _takes(taker: object, other: object) -> bool:
    """Whether ``other`` can be the residual of ``taker``, and the sum is of its kind."""
    if not isinstance(taker, Deferred) or type(other) not in (*PLAIN, Deferred):
        return False
    recipe = taker.pending()
    return (
        recipe is not None
        and recipe.residual is None
        and recipe.activation is None
        and other.shape == taker.shape
        and other.dtype == taker.dtype
        and other.device == taker.device
        and other.layout == torch.strided
        and not other.is_inference()
    )


# What a result takes in, by function; torch's own are the same for a module and for an operator.
TAKEN_IN: dict[Callable, Callable[..., Tensor | None]] = {
    F.relu: partial(_activated, "relu", False),
    torch.relu: partial(_activated, "relu", False),
    Tensor.relu: partial(_activated, "relu", False),
    torch.relu_: partial(_activated, "relu", True),
    Tensor.relu_: partial(_activated, "relu", True),
    F.relu6: partial(_activated, "relu6", False),
    F.hardtanh: _hardtanh,  # as nn.ReLU6 calls it
    F.silu: partial(_activated, "silu", False),
    F.hardswish: partial(_activated, "hardswish", False),
    torch.add: partial(_summed, False),
    Tensor.add: partial(_summed, False),
    Tensor.add_: partial(_summed, True),
}
