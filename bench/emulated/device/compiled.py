"""Triton's launches on the emulated device: compiled for sm_90, their instructions emulated.

As on a device Triton compiles once for each specialisation, and operations of this package keep
their plans and launch with addresses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from ..ptx.driver import Device, Launcher
from . import bindings, launches

ARCH = 90


class CudaDevice(Device):
    """What Triton asks of a driver, of the emulated device."""

    def __init__(self) -> None:
        super().__init__(ARCH, str)
        self.tensors = _Memory()
        self.launcher_cls = CudaLauncher

    def get_current_stream(self, device: Any = None) -> int:
        return bindings.ops().current_stream()

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class CudaLauncher(Launcher):
    """One compiled kernel: a launch of the current stream."""

    def __call__(self, width, height, depth, stream, function, *rest):
        first, args = rest[:4], list(rest[4:])
        for i, (_, kind) in enumerate(self.kinds):
            if kind.startswith("*") and not isinstance(args[i], Tensor) and args[i]:
                args[i] = bindings.ops().memory_at(args[i])

        def launch(*args: Any) -> None:
            Launcher.__call__(self, width, height, depth, stream, function, *first, *args)

        launches.run(function, launch, tuple(args), {})


class _Memory(dict):
    """The device's memory by address, for launches with nothing else."""

    def __missing__(self, address: int) -> Tensor:
        return bindings.ops().memory_at(address)


def install() -> None:
    """Has Triton launch on the emulated device."""
    driver.set_active(CudaDevice())
