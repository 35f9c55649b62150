"""What a hub was made from: enough to build its experts again, without weights.

Plain data, so that it can be copied, pickled and written down; a model keeps it as ``origin``, and
whoever saves the model writes it beside the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ExpertOrigin:
    """One expert. spec: the text that ``hub.ExpertSpec.parse`` reads, with the size that its
    network works at; None of a module of one's own. label: what tables call it. module: the class
    of the network, for messages. config: of a network in a folder or a repository of timm's, the
    text that says there which it is; None: its name does."""

    spec: str | None
    label: str
    module: str
    config: str | None = None

    @classmethod
    def of_module(cls, module: nn.Module) -> ExpertOrigin:
        """Of an expert that no name stands for."""
        name = type(module).__name__
        return cls(None, name, name)


@dataclass(frozen=True)
class Origin:
    """A hub. input_size: pixels a side of its images, None: not known. router: as
    ``create_model`` takes it; None: a generator of one's own. task: what is learned, as
    ``runs.build`` describes it; None: outputs without a meaning."""

    experts: tuple[ExpertOrigin, ...]
    input_size: int | None = None
    router: str | None = None
    task: Mapping[str, Any] | None = None

    @classmethod
    def of_modules(cls, modules: Sequence[nn.Module]) -> Origin:
        """Of a model that was made of modules alone."""
        experts = [ExpertOrigin.of_module(module) for module in modules]
        labels = numbered([expert.label for expert in experts])
        return cls(
            tuple(dataclasses.replace(e, label=n) for e, n in zip(experts, labels, strict=True))
        )

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(expert.label for expert in self.experts)

    def with_task(self, task: Mapping[str, Any]) -> Origin:
        return dataclasses.replace(self, task=task)

    def with_expert(self, expert: ExpertOrigin) -> Origin:
        """With one more; its label gets a number where another is called so."""
        *_, label = numbered([*self.labels, expert.label])
        more = dataclasses.replace(expert, label=label)
        return dataclasses.replace(self, experts=(*self.experts, more))

    def with_module(self, module: nn.Module) -> Origin:
        """With one more, that no name stands for."""
        return self.with_expert(ExpertOrigin.of_module(module))

    def without(self, index: int) -> Origin:
        kept = (*self.experts[:index], *self.experts[index + 1 :])
        return dataclasses.replace(self, experts=kept, router=_renumbered(self.router, index))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number behind those that occur again."""
    found: list[str] = []
    for name in names:
        number, shown = 1, name
        while names.count(name) > 1 and (shown == name or shown in (*names, *found)):
            shown, number = f"{name} #{number}", number + 1
        found.append(shown)
    return tuple(found)


def _renumbered(router: str | None, removed: int) -> str | None:
    """ "expert:3" as it is called once an expert before it has gone."""
    kind, _, number = (router or "").partition(":")
    if kind != "expert" or not number.isdecimal() or int(number) < removed:
        return router
    return f"{kind}:{int(number) - 1}"
