"""Turns the emulated device on in this process, before torch is imported.

Nothing is imported for it that the program does not import itself: a finder waits for
``torch.cuda``, for Triton and its interpreter, and for what chooses between Triton and torch.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from . import library

SWITCH = "HUBPATH_EMULATED_DEVICE"  # of the environment: processes that are started inherit it
REPORT = "HUBPATH_EMULATED_REPORT"  # says at the end of a process what was counted
KERNELS = "HUBPATH_EMULATED_KERNELS"  # one of:
KINDS = ("interpreted", "compiled", "torch")  # by Triton; for sm_90; torch's operators instead


def start() -> None:
    """Has the torch that is imported next see one CUDA device. RuntimeError if it cannot be."""
    if "torch" in sys.modules:
        raise RuntimeError("the emulated device must be started before torch is imported")
    built = library.build()

    def fill_torch() -> None:
        from . import bindings

        bindings.install(sys.modules["torch._C"], built)

    finder = _Finder(fill_torch)
    sys.meta_path.insert(0, finder)
    atexit.register(_let_backward_end)
    if os.environ.get(REPORT):
        atexit.register(_report)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, fill_torch: Callable[[], None]) -> None:
        self._fill_torch = fill_torch

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name == "torch.cuda":
            self._fill_torch()
        then = _PATCHES.get(name)
        if then is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = _Then(spec.loader, then)
        return spec


class _Then(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)


def _patch_interpreter(module: ModuleType) -> None:
    from . import launches

    launches.install(module)


def _drive_triton(module: ModuleType) -> None:
    if os.environ.get(KERNELS) == "compiled":
        from . import compiled

        compiled.install()


def _patch_choice(module: ModuleType) -> None:
    if os.environ.get(KERNELS) == "torch":
        module.triton_ops = lambda: None  # as where Triton is not installed


def _let_packages_see(module: ModuleType) -> None:
    # Isolated, Python reads nothing of the environment, by which processes see the device.
    module.PYTHON = (sys.executable, "-s")


_PATCHES = {
    "triton": _drive_triton,
    "triton.runtime.interpreter": _patch_interpreter,
    "hubpath_fast._backends": _patch_choice,
    "hubpath_fast.serving.proof": _let_packages_see,
}


def _let_backward_end() -> None:
    """A backward pass returns a moment before the device's thread has let go of its Python objects;
    a process that ends in that moment is aborted. Behind a pass without any the thread has."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    leaf = torch.ones((), device="cuda", requires_grad=True)
    (leaf + 1).backward()


def _report() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    from . import bindings

    races = bindings.ops().take_races()
    waits = bindings.ops().waits()
    print(f"emulated device: waits of the host\n{waits}races\n{races or 'none'}", file=sys.stderr)
