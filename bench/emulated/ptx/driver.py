"""A driver for Triton whose device is the emulator: kernels are compiled for a GPU and run here.

    with emulated() as device:
        kernel[(programs,)](tensor, ...)      # CPU tensors
    device.launches                           # names of the kernels that ran

Triton must not be interpreting: TRITON_INTERPRET has to be unset when it is first imported.
Kernels are specialised by the addresses that the tensors have, as Triton does it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakValueDictionary

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from ...no_device import NoDevice, driven_by
from .machine import Program
from .memory import Buffer, GlobalMemory

_SHARED = 227 * 1024  # bytes a program may ask for on sm_90
_FLOATS = {"fp16": "<e", "fp32": "<f", "fp64": "<d"}
_NUMBER = 0  # the device's


class Device(NoDevice):
    """What Triton asks of a driver, for sm_90 (``arch``) without one.

    launches: names of the kernels that ran; ``kept`` of them from a kept plan, with addresses.
    """

    def __init__(self, arch: int, edit: Callable[[str], str]) -> None:
        super().__init__(arch)
        self.launches: list[str] = []
        self.kept = 0
        self.tensors: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by address
        self._edit = edit
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": _SHARED},
            # module, function, registers, spills, threads a program
            load_binary=lambda name, binary, shared, device: (name, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return _NUMBER

    def program(self, text: str) -> Program:
        return _ready(self._edit(text))


@functools.lru_cache(maxsize=256)
def _ready(text: str) -> Program:
    """The kernel of this PTX, made ready once: it takes about as long as a small launch."""
    return Program(text)


@contextlib.contextmanager
def emulated(
    arch: int = 90, edit: Callable[[str], str] = str, keep: bool = False
) -> Iterator[Device]:
    """Triton launches on the emulator meanwhile, what ``edit`` makes of a kernel's PTX.

    keep: operations of this package keep their plans, as for tensors of a GPU: from the second
    call on kernels are launched past Triton, with addresses.

    Raises RuntimeError under the interpreter.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    device = Device(arch, edit)
    with driven_by(device), _plans_kept(device) if keep else contextlib.nullcontext():
        yield device


@contextlib.contextmanager
def _plans_kept(device: Device) -> Iterator[None]:
    """Tensors say that they are the device's, and it learns where they are as they are asked."""
    from hubpath_fast.kernels import _launch

    device_of, data_ptr = _launch.device_of, Tensor.data_ptr
    was_own = "data_ptr" in vars(Tensor)

    def noted(tensor: Tensor) -> int:
        address = data_ptr(tensor)
        device.tensors[address] = tensor
        return address

    _launch.device_of, Tensor.data_ptr = lambda tensor: _NUMBER, noted
    try:
        yield
    finally:
        _launch.device_of = device_of
        if was_own:
            Tensor.data_ptr = data_ptr
        else:
            del Tensor.data_ptr


class Launcher:
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
        device, memory, arguments = driver.active, _Arguments(), []
        for (name, kind), value in zip(self.kinds, args, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*") and not isinstance(value, Tensor) and value:
                value = device.tensors[value]
            arguments.append(memory.add(name, kind, value))
        device.launches.append(function)
        device.kept += not any(isinstance(value, Tensor) for value in args)
        program, grid = device.program(self.text), (width, height, depth)
        program.launch(grid, arguments, memory.buffers(), self.shared)


class _Arguments:
    """The storages that a launch's pointers point into: one that several share is one buffer."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # by address
        self._names: dict[int, list[str]] = {}

    def add(self, name: str, kind: str, value: Tensor | float | None) -> int | np.ndarray:
        """An argument's value as the emulator takes it."""
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            start = storage.data_ptr()
            self._storages[start] = storage
            self._names.setdefault(start, []).append(name)
            number = list(self._storages).index(start)
            return GlobalMemory.address(number, value.data_ptr() - start + start % 64)
        if kind in _FLOATS:
            return np.frombuffer(struct.pack(_FLOATS[kind], value), np.uint8)
        return int(value or 0)

    def buffers(self) -> list[Buffer]:
        return [
            Buffer("/".join(self._names[start]), _bytes(storage), start % 64)
            for start, storage in self._storages.items()
        ]


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    """A storage's own memory, not a copy."""
    size = storage.nbytes()
    if size == 0:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(storage.data_ptr()))
