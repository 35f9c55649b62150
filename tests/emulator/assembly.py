"""Kernels for the emulator's own tests, written by hand in PTX."""

from __future__ import annotations

import numpy as np

from bench.emulated.ptx.machine import Program
from bench.emulated.ptx.memory import Buffer, GlobalMemory

_MODULE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry planted(
    .param .u64 .ptr .global .align 1 planted_param_0,
    .param .u64 .ptr .global .align 1 planted_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<99>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
    ld.param.b64 %rd1, [planted_param_0];
    ld.param.b64 %rd2, [planted_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
{body}
    ret;
}}
"""


def run(
    body: str,
    source: np.ndarray | None = None,
    result: np.ndarray | None = None,
    programs: int = 1,
    threads: int = 32,
    shared: int = 0,
) -> np.ndarray:
    """Run ``body`` on a source (address %rd1) and a result (%rd2, int32 by default), the thread in
    %r1 and the program in %r2; returns the result."""
    source = np.zeros(threads, np.uint32) if source is None else source
    result = np.zeros(threads * programs, np.uint32) if result is None else result
    buffers = [
        Buffer(name, data.view(np.uint8).reshape(-1))
        for name, data in (("source", source), ("result", result))
    ]
    addresses = [GlobalMemory.address(0), GlobalMemory.address(1)]
    program = Program(_MODULE.format(threads=threads, body=body))
    program.launch((programs,), addresses, buffers, shared)
    return result


def apply(instruction: str, *operands: np.ndarray, size: int = 4) -> np.ndarray:
    """What ``instruction`` leaves in ``$0``, of ``size`` bytes, for ``$1``, ``$2`` ... of every
    thread: operands are arrays [32] of 4 or 8 bytes. As unsigned integers."""
    lines, registers = [], {}
    columns = np.zeros((len(operands) + 1, 32), np.uint64)
    for i, operand in enumerate(operands, start=1):
        bits = operand.view(f"u{operand.itemsize}")
        columns[i] = bits
        name = f"%rd{10 + i}" if operand.itemsize == 8 else f"%r{10 + i}"
        lines.append(f"ld.global.b{8 * operand.itemsize} {name}, [%rd5+{256 * i}];")
        registers[f"${i}"] = name
    registers["$0"] = target = f"%rd{10}" if size == 8 else f"%r{10}"
    for name in sorted(registers, reverse=True):
        instruction = instruction.replace(name, registers[name])
    body = "\n".join(
        [
            "mul.wide.u32 %rd3, %r1, 8;",
            "add.s64 %rd5, %rd1, %rd3;",
            "add.s64 %rd6, %rd2, %rd3;",
            *lines,
            instruction,
            f"st.global.b{8 * size} [%rd6], {target};",
        ]
    )
    result = run(body, columns, np.zeros(32, np.uint64))
    return result if size == 8 else result.astype(np.uint32)
