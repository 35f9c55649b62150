"""Launches that end where Triton would hand them to the driver: the host's share without a GPU.

    with launches_end_here(take) as compiled:
        step()      # public operations, on CPU tensors

Triton chooses a kernel for every launch as it does on a GPU, and takes one that was never compiled;
``take(kernel, grid, arguments)`` stands for the launch. Nothing is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import triton.compiler
from hubpath_fast.kernels import _launch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import precompile, timing

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
        # Behind the grid: stream, function, metadata of the kernel and the launch, two hooks.
        self._run = lambda x, y, z, *rest: take(stub, (x, y, z), rest[6:])

    def __del__(self) -> None:
        """There is nothing to unload."""


class _Driver(precompile.NoDevice):
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

    before, compile_one, device_of = driver._active, triton.compiler.compile, _launch.device_of
    driver.set_active(_Driver(arch))
    triton.compiler.compile, _launch.device_of = compile_nothing, lambda tensor: DEVICE
    try:
        with precompile.cpu_tensors_are_taken():
            yield compiled
    finally:
        for stub in compiled:
            stub.source.fn.device_caches.pop(DEVICE, None)
            stub.source.fn.compile = compile_one
        driver._active = before
        triton.compiler.compile, _launch.device_of = compile_one, device_of


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
