"""Networks whose parameters have shapes and no memory, for weights that are put in their place.

Unlike a network that is built on torch's meta device as a whole, its buffers hold their numbers:
those that no file keeps, such as an index of window attention, are computed as it is built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

_PATCHED = threading.RLock()


def without_memory(make: Callable[[], T], modules: Callable[[T], nn.Module]) -> T:
    """What ``make`` makes, the parameters of its ``modules`` on torch's meta device.

    An architecture that computes with its parameters as it is built has them with memory.
    """
    try:
        with _empty_parameters():
            made = make()
        # A buffer that was computed from a parameter has lost its numbers with it.
        if not any(buffer.is_meta for buffer in modules(made).buffers()):
            return made
    except (NotImplementedError, RuntimeError):  # of an operation that needs the numbers
        pass
    return make()


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Parameters that this thread registers move to the meta device; tied ones stay tied."""
    register, thread = nn.Module.register_parameter, threading.get_ident()
    moved = WeakTensorKeyDictionary()

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return
        if parameter not in moved:
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            empty.__dict__.update(parameter.__dict__)
            moved[parameter] = empty
        module._parameters[name] = moved[parameter]

    with _PATCHED:  # two that patch and restore in turns would leave one patch behind
        nn.Module.register_parameter = register_empty
        try:
            yield
        finally:
            nn.Module.register_parameter = register
