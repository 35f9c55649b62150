"""Triton's interpreter with numpy 2.4 or later: loop bounds that are known only when a kernel runs.

The interpreter holds a scalar as an array of one element and hands it to ``range`` through
``__index__``. Up to Triton 3.7 this is ``int(array)``, which numpy deprecated in 1.25 for arrays
that are not zero-dimensional and refuses from 2.4 on: "only 0-dimensional arrays can be converted
to Python scalars". Later versions of Triton squeeze the array first; ``mend`` does the same.

Compiled kernels have nothing to do with it, so nothing imports this module on a device.
"""

from __future__ import annotations

import numpy as np
import triton
from triton.runtime import interpreter

_MENDED_IN = (3, 8)


def _refused_by_numpy() -> bool:
    try:
        int(np.ones(1, dtype=np.int32))
    except TypeError:
        return True
    return False


def _is_affected() -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version < _MENDED_IN and _refused_by_numpy()


def mend() -> None:
    """Make scalars usable as loop bounds where this Triton and this numpy do not fit together."""
    if not _is_affected():
        return
    # Each launch puts the interpreter's methods on the tensor class by this function, and takes
    # them off again: the replacement goes along.
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_and_mend
