"""A driver for Triton whose device is the emulator: kernels are compiled for a GPU and run here.

    with emulated() as device:
        kernel[(programs,)](tensor, ...)      # CPU tensors
    device.launches                           # names of the kernels that ran

Triton must not be interpreting: TRITON_INTERPRET has to be unset when it is first imported.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from bench.precompile import NoDevice

from .machine import Program
from .memory import Buffer, GlobalMemory

_SHARED = 227 * 1024  # bytes a program may ask for on sm_90
_FLOATS = {"fp16": "<e", "fp32": "<f", "fp64": "<d"}


class Device(NoDevice):
    """What Triton asks of a driver, for sm_90 (``arch``) without one."""

    def __init__(self, arch: int, edit: Callable[[str], str]) -> None:
        super().__init__(arch)
        self.launches: list[str] = []
        self._edit, self._programs = edit, {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": _SHARED},
            # module, function, registers, spills, threads a program
            load_binary=lambda name, binary, shared, device: (name, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = _Launcher

    def program(self, text: str) -> Program:
        """The kernel of this PTX, made ready once."""
        if text not in self._programs:
            self._programs[text] = Program(self._edit(text))
        return self._programs[text]


@contextmanager
def emulated(arch: int = 90, edit: Callable[[str], str] = str) -> Iterator[Device]:
    """Triton launches on the emulator meanwhile, what ``edit`` makes of a kernel's PTX.

    Raises RuntimeError under the interpreter.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    before, device = driver._active, Device(arch, edit)  # ``active`` would look for a GPU
    driver.set_active(device)
    try:
        yield device
    finally:
        driver.set_active(before)


class _Launcher:
    """One compiled kernel, called as Triton calls what its drivers make.

    Triton keeps it for good, beyond one ``emulated``: it runs on whichever device is active.
    """

    def __init__(self, source, metadata) -> None:
        self.shared = metadata.shared
        self.kinds = list(source.signature.items())  # (name, type) of every parameter
        files = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json")
        path = next(path for name, path in files.items() if name.endswith(".ptx"))
        self.text = Path(path).read_text()

    def __call__(self, width, height, depth, stream, function, *rest):
        args = rest[4:]  # the first are packed metadata, launch metadata, and two hooks
        names, storages = {}, {}
        for (name, _), value in zip(self.kinds, args, strict=True):
            if isinstance(value, torch.Tensor):
                start = value.untyped_storage().data_ptr()
                names.setdefault(start, []).append(name)
                storages[start] = value.untyped_storage()
        buffers = [Buffer("/".join(names[start]), _bytes(s)) for start, s in storages.items()]
        arguments = [
            self._argument(kind, value, list(storages))
            for (_, kind), value in zip(self.kinds, args, strict=True)
            if kind != "constexpr"
        ]
        device = driver.active
        device.launches.append(function)
        device.program(self.text).launch((width, height, depth), arguments, buffers, self.shared)

    @staticmethod
    def _argument(kind: str, value, starts: list[int]) -> int | np.ndarray:
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            return GlobalMemory.address(starts.index(start), value.data_ptr() - start)
        if kind in _FLOATS:
            return np.frombuffer(struct.pack(_FLOATS[kind], value), np.uint8)
        return int(value)


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    """A storage's own memory, not a copy."""
    size = storage.nbytes()
    if size == 0:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(storage.data_ptr()))
