"""BatchNorm over the valid rows of a padded group, in networks whose code knows nothing of it.

For the length of a call the layers' ``forward`` is another one, as an attribute of each layer: no
module, parameter or buffer is replaced or renamed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .deferred import Call, deferred, may_defer, settled

# timm's BatchNorm with dropout and an activation; named, since timm need not be installed.
WITH_ACTIVATION = ("timm.layers.norm_act", "BatchNormAct2d")


class OtherRowsError(TypeError):
    """A layer was given another number of rows than the module: which of them are padding is
    unknown."""


class Group:
    """The padded rows that a module is called with. count, fuses: of ``masked``.
    capacity: how many there are; None where only parts of the module are called. calls: the last
    call of each layer, of those whose results were deferred."""

    def __init__(self, count: Tensor, fuses: bool):
        self.count, self.fuses = count, fuses
        self.capacity: int | None = None
        self.calls: dict[nn.Module, Call] = {}

    def finish(self) -> None:
        """Running statistics move with every call, also if no one used its result."""
        for call in self.calls.values():
            call.finish()
        self.calls.clear()


@contextlib.contextmanager
def masked(module: nn.Module, count: Tensor, fuses: bool = True) -> Iterator[None]:
    """Within, ``module`` may be called with padded rows: BatchNorm layers that take statistics of
    the batch take them of the first rows, and keep them, by ``functional.masked_batch_norm``.

    Parts of it may be called again by themselves, as checkpoints do in a backward pass: also within
    another ``masked`` than the forward pass. For modules of which ``eligible.couples_rows`` says
    None.

    count: int32 scalar on the rows' device: how many are valid, read there. fuses: whether they are
    computed together with activations and sums that follow them (see ``deferred``). A module with
    an ``autograd.Function`` behind BatchNorm fails so, and works without.
    """
    group = Group(count, fuses)
    own = {
        layer: partial(forward, layer, group)
        for layer in module.modules()
        if (forward := _forward_of(layer)) is not None
    }
    own[module] = partial(_whole, own.get(module, module.forward), group)
    before = {layer: vars(layer)["forward"] for layer in own if "forward" in vars(layer)}
    try:
        for layer, forward in own.items():
            vars(layer)["forward"] = forward
        yield
        group.finish()
    finally:
        for layer in own:
            vars(layer).pop("forward", None)
        for layer, forward in before.items():
            vars(layer)["forward"] = forward


def is_maskable(layer: nn.Module) -> bool:
    """Whether it is a BatchNorm layer that ``masked`` knows all of."""
    if not isinstance(layer, _BatchNorm) or "forward" in vars(layer):
        return False
    forward = type(layer).forward
    named = (forward.__module__, forward.__qualname__)
    return forward is _BatchNorm.forward or named == (
        WITH_ACTIVATION[0], f"{WITH_ACTIVATION[1]}.forward",
    )  # fmt: skip


def takes_statistics(layer: _BatchNorm) -> bool:
    """Whether it normalises by statistics of the batch, as the mode it is in says."""
    return layer.training or (layer.running_mean is None and layer.running_var is None)


def _forward_of(layer: nn.Module) -> Callable[[nn.Module, Group, Tensor], Tensor] | None:
    """What takes the place of its forward; None: nothing."""
    if not is_maskable(layer) or not takes_statistics(layer):
        return None
    return _batch_norm if type(layer).forward is _BatchNorm.forward else _batch_norm_act


def _whole(forward: Callable, group: Group, *args: object, **kwargs: object) -> object:
    """The module's own forward, once it is known how many rows there are; all of it computed."""
    group.capacity = next(map(len, filter(_is_rows, (*args, *kwargs.values()))), None)
    found = settled(forward(*args, **kwargs))
    group.finish()
    return found


def _is_rows(given: object) -> bool:
    return isinstance(given, Tensor) and given.dim() > 0


def _batch_norm(layer: _BatchNorm, group: Group, x: Tensor) -> Tensor:
    layer._check_input_dim(x)
    if group.capacity not in (None, len(x)):
        raise OtherRowsError(
            f"{type(layer).__name__} got {len(x)} rows where the module has {group.capacity}: "
            "which of them are padding is unknown"
        )
    kept = layer.training and layer.track_running_stats and layer.running_mean is not None
    momentum = layer.momentum
    if momentum is None and layer.num_batches_tracked is None:
        momentum = 0.0  # as torch's layers do it
    call = Call(
        settled(x),
        group.count,
        layer.weight,
        layer.bias,
        # As data: torch's own layers do not count their writes either, and the backward pass of an
        # earlier forward, which has kept these for no use, would find them changed.
        layer.running_mean.data if kept else None,
        layer.running_var.data if kept else None,
        momentum,
        layer.eps,
        layer.num_batches_tracked if kept else None,
    )
    # The order of its calls is the order in which its statistics move.
    if (earlier := group.calls.pop(layer, None)) is not None:
        earlier.finish()
    if not (group.fuses and may_defer(call.x)):
        return call.compute()
    # What is done with is let go, and its input with it: autograd need not keep that.
    group.calls = {of: other for of, other in group.calls.items() if not other.moved}
    group.calls[layer] = call
    return deferred(call)


def _batch_norm_act(layer: _BatchNorm, group: Group, x: Tensor) -> Tensor:
    return layer.act(layer.drop(_batch_norm(layer, group, x)))
