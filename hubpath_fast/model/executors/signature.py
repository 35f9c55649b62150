"""What captured graphs took for granted of an expert, and whether it still holds.

Addresses, modes, settings, hooks, precision and layouts: with others, a graph must not be replayed.
That is asked at every step, and comparing it all by value takes Python milliseconds for a
ResNet-50. So the objects are remembered: as long as the expert holds the very same ones, and its
tensors lie where they lay, nothing has changed.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from operator import attrgetter, getitem, is_

import torch
from torch import Tensor, nn

from .eligible import hooks
from .members import Members
from .rows import RowSource

# What every module has, and is looked at otherwise: its members and hooks.
MACHINERY = vars(nn.Module()).keys() - {"training"}
# Settings that are compared by value; of others only the type counts.
PLAIN = {bool, int, float, str, types.NoneType, types.FunctionType, types.BuiltinFunctionType}
_requires_grad = attrgetter("requires_grad")
_backward_hooks = attrgetter("_backward_hooks")


class Signature:
    """Of one expert that gets its rows from ``source``; the number of rows does not count."""

    def __init__(self, expert: nn.Module, source: RowSource):
        self._source = _conditions(source)
        self._values = _values(expert)
        self._remember(expert)

    def holds(self, expert: nn.Module, source: RowSource) -> bool:
        """Whether graphs that were captured then may be replayed now."""
        if self._source != _conditions(source):
            return False
        if self._expert is expert and self._is_as_it_was():
            return True
        # Some object was replaced, perhaps by an equal one: only values tell.
        if self._values != _values(expert):
            return False
        self._remember(expert)
        return True

    def _remember(self, expert: nn.Module) -> None:
        self._expert, modules = expert, list(expert.modules())
        self._members = Members(modules)
        self._hooks = [
            hooked
            for module in modules
            for hooked in (
                module._forward_hooks, module._forward_pre_hooks,
                module._backward_hooks, module._backward_pre_hooks,
            )
        ]  # fmt: skip
        self._attributes = [vars(module) for module in modules]
        self._counts = list(map(len, self._attributes))
        watched = [
            (attributes, key)
            for attributes in self._attributes
            for key, value in attributes.items()
            # A tensor that is no parameter and no buffer is what a layer remembers of a step.
            if key not in MACHINERY and not isinstance(value, Tensor)
        ]
        self._owners, self._keys = zip(*watched, strict=True)
        self._settings = list(map(getitem, self._owners, self._keys))  # kept, as the members are
        self._tensors = list(_tensors(modules))
        self._state = self._read()

    def _is_as_it_was(self) -> bool:
        """In a few passes that run in C."""
        try:
            return (
                self._members.same()
                and self._counts == list(map(len, self._attributes))
                and all(map(is_, self._settings, map(getitem, self._owners, self._keys)))
                and self._state == self._read()
            )
        except KeyError:  # a setting is gone, and another came
            return False

    def _read(self) -> tuple:
        """What may change of objects that stay the same."""
        return (
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(_requires_grad, self._tensors)),
            any(self._hooks),
            any(map(_backward_hooks, self._tensors)),
        )


def _conditions(source: RowSource) -> tuple:
    device = source.x.device.type
    return (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        source.row_kind(),
        source.requires_grad,
    )


def _values(expert: nn.Module) -> list[object]:
    """Everything by value: of each module its identity, hooks and settings, and of each tensor."""
    modules = list(expert.modules())
    found: list[object] = []
    for module in modules:
        found += (id(module), hooks(module))
        for key, value in vars(module).items():
            if key not in MACHINERY:
                found += (key, value if _is_plain(value) else type(value))
    for tensor in _tensors(modules):
        found += (tensor.data_ptr(), tensor.dtype, tensor.requires_grad)
        found.append(bool(tensor._backward_hooks))
    return found


def _is_plain(value: object) -> bool:
    return type(value) in PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)
