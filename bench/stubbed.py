"""Launches that end where Triton would hand them to the driver: the host's share without a GPU.

    with launches_end_here(take) as compiled:
        step()      # public operations, on CPU tensors

Triton chooses a kernel for every launch as it does on a GPU, and takes one that was never compiled;
``take(kernel, grid, arguments)`` stands for the launch. Nothing is computed. Classes are not looked
at, which on a GPU would be a wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import triton.compiler
from hubpath_fast.kernels import _launch
from triton.runtime.jit import JITFunction

from hubpath_fast import _checks

from . import precompile, timing
from .no_device import NoDevice, driven_by

DEVICE = 1000  # no real device's number: Triton keeps kernels by it


class Stub:
    """What Triton takes for a compiled kernel; ``source`` and ``options`` say which."""

    def __init__(self, source, options: dict) -> None:
        self.source, self.options = source, options


class _Kernel(triton.compiler.CompiledKernel):
    """Never compiled, and "loaded" already."""

    def __init__(self, stub: Stub, take: Callable) -> None:
        self.src, self.name = stub.source, stub.source.fn.__name__
        self.module = self.function = self.packed_metadata = 0
        self._run = partial(_launch_one, take, stub)

    def __del__(self) -> None:
        """There is nothing to unload."""


def _launch_one(
    take, stub, x, y, z, stream, function, packed, metadata, enter, leave, *arguments
) -> None:
    """As Triton's launchers do, hooks included."""
    if enter is not None:
        enter(metadata)
    take(stub, (x, y, z), arguments)
    if leave is not None:
        leave(metadata)


class _Driver(NoDevice):
    def get_current_device(self) -> int:
        return DEVICE


@contextlib.contextmanager
def launches_end_here(
    take: Callable[[Stub, tuple[int, ...], tuple], object] = lambda *_: None, arch: int = 90
) -> Iterator[list[Stub]]:
    """Within, CPU tensors count as the GPU's, and a launch calls ``take``: what was compiled.

    Raises RuntimeError where the kernels are interpreted.
    """
    timing.refuse_interpreter()
    compiled: list[Stub] = []

    def compile_nothing(source, target=None, options=None, **_):
        compiled.append(Stub(source, options))
        return _Kernel(compiled[-1], take)

    compile_one, device_of = triton.compiler.compile, _launch.device_of
    check_range = _checks.check_range
    triton.compiler.compile, _launch.device_of = compile_nothing, lambda tensor: DEVICE
    _checks.check_range = lambda *_: None
    try:
        with driven_by(_Driver(arch)), precompile.cpu_tensors_are_taken():
            yield compiled
    finally:
        for stub in compiled:
            stub.source.fn.device_caches.pop(DEVICE, None)
            stub.source.fn.compile = compile_one
        triton.compiler.compile, _launch.device_of = compile_one, device_of
        _checks.check_range = check_range


def planned_each_time(call: Callable[[], object]) -> Callable[[], object]:
    """The same call with nothing taken from what was kept: ``JITFunction.run`` is replaced."""
    run = JITFunction.run

    def replaced() -> object:
        JITFunction.run = lambda *arguments, **options: run(*arguments, **options)
        try:
            return call()
        finally:
            JITFunction.run = run

    return replaced
