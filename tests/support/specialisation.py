"""Which kernels a call would compile on a GPU, by Triton's own cache keys and without a GPU.

Triton compiles a kernel once per key: the types of the run-time arguments, whether an integer is 1
or a multiple of 16 and a pointer 16-byte aligned (unless the kernel says ``do_not_specialize``),
the values of the constexprs, and the launch options such as num_warps. The keys are computed from
the arguments of each launch by the function with which Triton computes them, for an H100. Kernels
are not run meanwhile, which would take the interpreter minutes: no launch depends on what another
has computed, as that would have to be waited for.

    with recorded() as first:
        step(48)
    with recorded() as second:
        step(47)
    assert second <= first  # nothing new to compile
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

Key = tuple[str, str]  # the kernel's name, and the rest of its key


@cache
def _binder(fn: Callable, do_not_specialize: tuple, not_on_alignment: tuple) -> Callable:
    """Triton's own function from a launch's arguments to (values, specialisation, options)."""
    kernel = JITFunction(
        fn,
        do_not_specialize=do_not_specialize,
        do_not_specialize_on_alignment=not_on_alignment,
    )
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def specialisation(kernel: Any, *args, **kwargs) -> Key:
    """The key of one launch of ``kernel``, a ``@triton.jit`` function, interpreted or not."""
    # The decorator's arguments: a dictionary of an interpreted function, fields of a compiled one.
    given = getattr(kernel, "kwargs", None) or vars(kernel)
    names = ("do_not_specialize", "do_not_specialize_on_alignment")
    bind = _binder(kernel.fn, *(tuple(given.get(name) or ()) for name in names))
    _, types, options = bind(*args, **kwargs)
    return kernel.fn.__name__, f"{types} {sorted(options.items())}"


@contextmanager
def recorded() -> Iterator[set[Key]]:
    """Collects the keys of all kernels launched inside the block."""
    keys: set[Key] = set()
    kind = type(triton.jit(_nothing))
    run = kind.run

    def recording(self, *args, grid, warmup, **kwargs):
        keys.add(specialisation(self, *args, **kwargs))

    kind.run = recording
    try:
        yield keys
    finally:
        kind.run = run


def _nothing():
    pass
