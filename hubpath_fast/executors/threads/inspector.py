"""Which experts may run concurrently with others, and which must run alone on the caller's thread.

Torch's generator of random numbers, modules that two experts share, and what hooks write to belong
to all threads: what they hold would depend on who comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..sharing import Sharing
from ..structure import hooks_of
from ..torch_private import is_compiled


class Inspection(NamedTuple):
    """Of one expert. parameters: those that require a gradient. alone: why it must run alone."""

    parameters: list[nn.Parameter]
    alone: str | None


class Inspector:
    """Looks at all experts. It is asked at every step, so what a class tells is kept."""

    def __init__(self):
        self._rates: dict[type, list[str]] = {}  # of a class: where it keeps how much it drops
        self._sharing = Sharing()

    def __call__(self, experts: Sequence[nn.Module]) -> list[Inspection]:
        inspections: list[Inspection] = []
        first = self._sharing(experts)
        together = Counter(first)
        for index, expert in enumerate(experts):
            parameters: list[nn.Parameter] = []
            alone = "is compiled" if is_compiled(expert) else None
            pending = [expert]
            while pending:  # by hand: modules() and parameters() cost it twice
                module = pending.pop()
                kind = type(module)
                rates = self._rates.get(kind)
                if rates is None:
                    rates = self._rates[kind] = _rates(module)
                if any(hooks_of(module)):
                    alone = f"has hooks (on {kind.__name__})"
                elif rates and module.training and any(getattr(module, r, 0) > 0 for r in rates):
                    alone = f"draws random numbers ({kind.__name__})"
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.requires_grad:
                        parameters.append(parameter)
                        if parameter._backward_hooks:
                            alone = "has hooks on its parameters"
                pending += [child for child in module._modules.values() if child is not None]
            if together[first[index]] > 1:
                alone = "shares modules with another expert"
            inspections.append(Inspection(parameters, alone))
        return inspections


def _rates(module: nn.Module) -> list[str]:
    """Where modules of this class keep how much they drop at random, as the names tell."""
    name = type(module).__name__
    dropping = "drop" in name.lower() or name == "StochasticDepth"
    return [
        key
        for key, value in vars(module).items()
        if isinstance(value, int | float)
        and ("drop" in key.lower() or (dropping and key in ("p", "prob")))
    ]
