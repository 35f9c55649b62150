"""An emulator of sm_90: what Triton compiles, run on CPU tensors with numpy.

    python -m bench.emulated.kernels        # every kernel of this package, against float64

It runs a kernel as a GPU would (the interpreter does not: it never sees a layout, a barrier or a
compiled address). A kernel of one's own, with Triton not interpreting (``driver.py``):

    with emulated():
        kernel[(programs,)](tensor, ...)

Raised as ``memory.Fault``, with the instruction and the program: accesses out of bounds or not
aligned, reads of shared memory that nothing wrote, races between the warps of a program (shared and
global memory, copies and products that are not waited for) and between programs, warp operations
with threads missing, device assertions. An instruction that is not known raises ``parse.Unknown``.

What it cannot show: time, races between launches, what ptxas makes of the PTX, and orders of
rounding that differ between GPUs. Approximate functions (``ex2.approx``) are exact here.
"""
