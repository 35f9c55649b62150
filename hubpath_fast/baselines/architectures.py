"""Whether networks have one architecture, as Zoo-Tuning, soups and Knowledge Flow ask."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..hub.expert import network


def difference(modules: Sequence[nn.Module], names: Sequence[str] | None = None) -> str | None:
    """None if all modules have one architecture; else a sentence on the first two that differ.

    One architecture: the same names and shapes of parameters and buffers, and at each name the same
    type of layer with the same settings (stride, padding, ...). Dropout's rate may differ, as may
    what a hub wraps around a network (a resizing, fixed BatchNorm statistics).

    modules: compared with the first one, in order; none or one never differ. names: what to call
    them in the sentence; default their numbers, from 0, and classes.
    """
    bodies = [network(module) for module in modules]
    names = names or [f"model {i} ({type(body).__name__})" for i, body in enumerate(bodies)]
    for name, body in zip(names[1:], bodies[1:], strict=True):
        reason = _reason(bodies[0], body)
        if reason is not None:
            return f"{names[0]} and {name} have different architectures: {reason}"
    return None


def _reason(a: nn.Module, b: nn.Module) -> str | None:
    if type(a) is not type(b):
        return f"one is a {_type(a)}, the other a {_type(b)}"
    for one, other, describe in (
        (dict(a.named_modules()), dict(b.named_modules()), _layer),
        (tensors_of(a), tensors_of(b), lambda tensor: str(list(tensor.shape))),
    ):
        for name in (*one, *other):
            if name not in one or name not in other:
                return f"only {'one' if name in one else 'the other'} has {name}"
            mine, its = describe(one[name]), describe(other[name])
            if mine != its:
                return f"{name} is {mine} in one and {its} in the other"
    return None


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by name, each shared one once."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def _layer(layer: nn.Module) -> str:
    """A layer's type, and its settings as it prints them."""
    settings = "" if "drop" in type(layer).__name__.lower() else layer.extra_repr()
    return f"{type(layer).__name__}({settings})"


def _type(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
