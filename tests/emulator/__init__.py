"""An emulator of sm_90 for the tests: what Triton compiles, run on CPU tensors with numpy.

    python -m tests.emulator [--only TEXT] [--list]        # from the repository's top, no GPU

runs every kernel of this package, forward and backward, as a GPU would run it (the interpreter does
not: it never sees a layout, a barrier or a compiled address), and compares with float64. A kernel
of one's own, with Triton not interpreting (``driver.py``):

    with emulated():
        kernel[(programs,)](tensor, ...)

Raised as ``memory.Fault``, with the instruction and the program: accesses out of bounds or not
aligned, reads of shared memory that nothing wrote, races between the warps of a program (shared and
global memory, copies and products that are not waited for) and between programs, warp operations
with threads missing, device assertions. An instruction that is not known raises ``ptx.Unknown``.

What it cannot show: time, and orders of rounding that differ between GPUs. Approximate functions
(``ex2.approx``) are exact here.
"""

from __future__ import annotations

import sys
from pathlib import Path

# ``python -m tests.emulator`` has no pytest to find tests/support.
sys.path.append(str(Path(__file__).resolve().parent.parent))
