"""Where there is no GPU: a driver with which Triton compiles, and CPU tensors for the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def driven_by(device: object) -> Iterator[None]:
    """Within, Triton's driver is ``device``."""
    from triton.runtime import driver

    # Triton's own ``active`` would look for a GPU; before 3.5 it is what is kept.
    before = driver._active if hasattr(driver, "_active") else driver.active
    driver.set_active(device)
    try:
        yield
    finally:
        driver.set_active(before)


class NoDevice:
    """What Triton asks a driver for when it compiles."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def cpu_tensors_go_to_kernels() -> Iterator[None]:
    """Within, public operations take CPU tensors to the kernels, which they refuse, rightly, where
    nothing could run there."""
    from hubpath_fast import _backends, kernels

    choose = _backends.choose
    _backends.choose = lambda name, x: choose(name, x) if name == "torch" else kernels
    try:
        yield
    finally:
        _backends.choose = choose
