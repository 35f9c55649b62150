"""Whether modules still hold the very same submodules, parameters and buffers; and their hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_, methodcaller

from torch import nn


class Structure:
    """What some modules hold, remembered. Asked at every step: a few passes that run in C."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._all = [
            held
            for module in modules
            for held in (module._modules, module._parameters, module._buffers)
        ]
        self._filled = list(filter(None, self._all))  # most layers have none of some kind
        self._lengths = list(map(len, self._all))
        # TorchScript modules have dictionaries of their own kind; dict's method is faster.
        plain = all(isinstance(held, dict) for held in self._filled)
        self._values = dict.values if plain else methodcaller("values")
        self._objects = list(self._held())  # kept, so that no other can take their identities

    def unchanged(self) -> bool:
        return self._lengths == list(map(len, self._all)) and all(
            map(is_, self._objects, self._held())
        )

    def _held(self) -> Iterator[object]:
        return chain.from_iterable(map(self._values, self._filled))


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """Where a module keeps hooks of its own, by kind."""
    return (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
