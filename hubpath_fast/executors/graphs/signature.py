"""What captured graphs took for granted of an expert, and whether it still holds.

Addresses, shapes, modes, settings, hooks, precision and layouts: with others, a graph must not be
replayed. That is asked at every step, and an expert has thousands of such things. So the objects
are remembered: as long as its modules hold the very same ones, it takes a few passes that run in C
to see so. What is not looked at: the contents of lists, dictionaries and other objects that modules
hold as settings.
"""

from __future__ import annotations

import types
from enum import Enum
from itertools import chain
from operator import attrgetter, getitem, is_

import torch
from torch import Tensor, nn

from ... import functional as HF
from ..rows import Batch
from ..structure import Structure, hooks_of

# What every module has, and is looked at otherwise: its structure and hooks.
MACHINERY = vars(nn.Module()).keys() - {"training"}
# Settings of which an equal one will do; of others only the very same object.
PLAIN = (bool, int, float, str, types.NoneType, torch.dtype, torch.device, Enum)
_shape, _requires_grad = attrgetter("shape"), attrgetter("requires_grad")
_backward_hooks = attrgetter("_backward_hooks")
_MISSING = object()


class Signature:
    """Of one expert, or generator, that reads ``source``; the number of rows does not count."""

    def __init__(self, expert: nn.Module, source: Batch):
        self._expert, self._source = expert, _conditions(source)
        modules = list(expert.modules())
        self._structure, self._settings = Structure(modules), Attributes(modules)
        self._hooks = list(chain.from_iterable(map(hooks_of, modules)))
        self._parameters, self._buffers = list(expert.parameters()), list(expert.buffers())
        self._state = self._read()

    def holds(self, expert: nn.Module, source: Batch) -> bool:
        """Whether graphs that were captured then may be replayed now."""
        return (
            self._expert is expert
            and self._source == _conditions(source)
            and self._structure.unchanged()
            and self._settings.hold()
            and self._state == self._read()
        )

    def ran(self) -> None:
        """The expert has just run, and nothing else was done to it since ``holds``."""
        self._settings.ran()

    @property
    def carried(self) -> list[str]:
        """The attributes by which the expert carries from step to step what no replay would."""
        return sorted(self._settings.carried)

    def _read(self) -> tuple:
        """What may change of objects that stay the same."""
        parameters = self._parameters
        return (
            list(map(Tensor.data_ptr, parameters + self._buffers)),
            list(map(Tensor.stride, parameters)),
            list(map(_shape, parameters)),
            list(map(_requires_grad, parameters)),
            any(self._hooks),
            any(map(_backward_hooks, parameters)),
        )


class Attributes:
    """What modules hold apart from submodules, parameters, buffers and hooks."""

    def __init__(self, modules: list[nn.Module]):
        self._attributes = [vars(module) for module in modules]
        self._rewritten: set[tuple[int, str]] = set()  # by the modules themselves, at each step
        self._kinds = {id(vars(module)): type(module).__name__ for module in modules}
        self.carried: set[str] = set()
        self._remember()

    def _remember(self) -> None:
        self._counts = list(map(len, self._attributes))
        watched = [
            (attributes, key)
            for attributes in self._attributes
            for key in attributes
            if key not in MACHINERY and (id(attributes), key) not in self._rewritten
        ]
        self._owners, self._keys = zip(*watched, strict=True)
        # Kept, so that no other object can take their identities, or their memory.
        self._kept = list(map(getitem, self._owners, self._keys))

    def hold(self) -> bool:
        if self._counts != list(map(len, self._attributes)):
            return False
        if self._same():
            return True
        found = zip(self._owners, self._keys, self._kept, strict=True)
        if not all(_equal(owner.get(key, _MISSING), kept) for owner, key, kept in found):
            return False
        self._remember()  # the new objects, for the next time
        return True

    def ran(self) -> None:
        """What the modules have rewritten since they were looked at is what they remember of a
        step, and no setting."""
        if self._counts == list(map(len, self._attributes)) and self._same():
            return
        known = {
            (id(owner), key): kept
            for owner, key, kept in zip(self._owners, self._keys, self._kept, strict=True)
        }
        for attributes in self._attributes:
            for key in attributes.keys() - MACHINERY:
                kept, found = known.get((id(attributes), key), _MISSING), attributes[key]
                if kept is not found:
                    self._rewritten.add((id(attributes), key))
                    if _carries(kept, found):
                        self.carried.add(f"{self._kinds[id(attributes)]}.{key}")
        self._remember()

    def _same(self) -> bool:
        try:
            return all(map(is_, self._kept, map(getitem, self._owners, self._keys)))
        except KeyError:  # one is gone, and another came
            return False


def _conditions(source: Batch) -> tuple:
    precision = HF.autocast_dtype(source.x.device.type)
    return precision, source.row_kind(), source.requires_grad


def _carries(kept: object, found: object) -> bool:
    """Whether the step itself made it so that a later one, or the loss, may depend on it: a number
    that it changed (a count of steps), or a tensor to be differentiated (a loss of its own)."""
    if isinstance(found, Tensor):
        return found.requires_grad
    return isinstance(kept, int | float) and isinstance(found, int | float) and kept != found


def _equal(value: object, kept: object) -> bool:
    if value is kept:
        return True
    if type(value) is not type(kept):
        return False
    if isinstance(value, tuple):  # torch.Size is one, too
        return len(value) == len(kept) and all(map(_equal, value, kept))
    return isinstance(value, PLAIN) and value == kept
