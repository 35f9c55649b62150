"""Activations that a kernel applies to what it has just computed, and their derivatives.

By number, since operations take numbers: ``ACTIVATIONS``. What is not a number stays so, as in
torch: a training run sees that it has diverged.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}
FROM_RESULT = (1, 2)  # whose derivative can be told from the result


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == 2:
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == 3:
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == 4:
        z = tl.where(z < -3, 0.0, tl.where(z > 3, z, z * (z + 3.0) / 6.0))
    return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative at z; of the first two, at the result as well."""
    if ACTIVATION == 1:
        z = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == 2:
        z = tl.where((z <= 0) | (z >= 6), 0.0, 1.0)
    elif ACTIVATION == 3:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        z = sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACTIVATION == 4:
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z / 3.0 + 0.5))
    return z
