"""Which experts must not run at once, since they hold the same module, parameter or buffer.

Autocast keeps the cast of a weight for whoever needs it next, and BatchNorm writes its buffers:
used on two streams that do not wait for each other, both are races.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_

from torch import nn

from .structure import Structure


class Sharing:
    """``sharing(experts)`` -> for each expert the first one that it is tied to, often itself.

    As long as all experts hold the same objects the answer is kept.
    """

    def __init__(self):
        self._experts: list[nn.Module] = []
        self._structure = Structure([])
        self._first: list[int] = []

    def __call__(self, experts: Sequence[nn.Module]) -> list[int]:
        same = len(experts) == len(self._experts) and all(map(is_, experts, self._experts))
        if not (same and self._structure.unchanged()):
            self._look(experts)
        return self._first

    def _look(self, experts: Sequence[nn.Module]) -> None:
        self._experts, owners = list(experts), {}
        self._structure = Structure(chain.from_iterable(expert.modules() for expert in experts))
        self._first = list(range(len(experts)))
        for index, expert in enumerate(experts):
            for held in chain(expert.modules(), expert.parameters(), expert.buffers()):
                self._tie(owners.setdefault(id(held), index), index)

    def _tie(self, a: int, b: int) -> None:
        low, high = sorted((self._first[a], self._first[b]))
        if low != high:
            self._first = [low if first == high else first for first in self._first]
