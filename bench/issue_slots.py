"""What a kernel's instructions cost, read off its machine code, beside the bytes it moves.

    python -m bench.issue_slots [--only TEXT] [--arch 90]

For each launch of the router and of gather, without a GPU: registers, the warps that fit on a
multiprocessor by them, instructions of one pass of its loop (of all of it, if it has none) by the
unit that carries them out, and an estimate of its time on an H100. No launch's time is measured.

The estimate: a warp issues an instruction every ``PACE`` cycles, a scheduler at most one a cycle;
the loop takes as many passes as the launch's TILES, and every tensor is moved once. The two times
overlap in part, sqrt(issue^2 + bytes^2), and a launch takes at least ``LEAST``. The two constants
are fitted: with them the router's launches as of commit bad0a04, counted so, are within 5 % of what
graphs of them took on an H100 and an H200, forward and backward (tests/bench/test_issue_slots.py).
They say what a change should gain, not what a kernel takes: caches and latencies are not in them,
and a loop in a loop counts once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from . import compile_report
from .compile_cases import CompileCase, every_case

PACE = 6.0  # cycles from one instruction of a warp to its next
LEAST = 8e-6  # seconds of a launch that waits for the one before, however small
SCHEDULERS, WARP_REGISTERS, PROGRAMS = 4, 65536 // 32, 32  # of a multiprocessor, sm_90
UNITS = {  # of the classes that have a column
    "SHFL": ("SHFL",),
    "MUFU": ("MUFU",),
    "FMA": ("FFMA", "FMUL", "FADD", "IMAD"),
    "LDG": ("LDG", "LDGSTS"),
    "STG": ("STG",),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "BAR": ("BAR",),
}


@dataclass(frozen=True)
class Device:
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s of a copy, as measured


H100 = Device(132, 1.98e9, 2.993e12)
H200 = Device(132, 1.98e9, 4.241e12)


@dataclass(frozen=True)
class Code:
    """Instructions of one warp: outside its outermost loops, and in one pass of them."""

    once: Counter[str]
    loop: Counter[str]

    def issued(self, passes: int) -> int:
        return self.once.total() + passes * self.loop.total()

    def of(self, unit: str) -> int:
        """Of a pass, or of all where there is no loop; "other" is what has no column."""
        counted = self.loop or self.once
        if unit == "other":
            return counted.total() - sum(self.of(name) for name in UNITS)
        return sum(counted[name] for name in UNITS[unit])


_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);", re.M)


def read_code(sass: str) -> Code:
    """Of a program's code as cuobjdump prints it, up to the branch to itself at its end."""
    lines = [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(sass)]
    loops = []
    for number, (at, name, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target is None:
            continue
        if int(target[1], 16) == at:
            lines = lines[:number]
            break
        if int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inside = [any(first <= at <= last for first, last in loops) for at, _, _ in lines]
    names = [name for _, name, _ in lines]
    return Code(
        Counter(name for name, within in zip(names, inside, strict=True) if not within),
        Counter(name for name, within in zip(names, inside, strict=True) if within),
    )


def resident_warps(registers: int, num_warps: int) -> int:
    """Of a multiprocessor, by registers, which are given out by eights, and by programs."""
    each = -(-registers // 8) * 8 * num_warps
    return min(PROGRAMS, WARP_REGISTERS // each) * num_warps


def issue_seconds(warps: int, issued: int, resident: int, device: Device) -> float:
    """For so many warps in all, of so many instructions each, ``resident`` a multiprocessor."""
    schedulers = device.multiprocessors * SCHEDULERS
    at_once = min(resident, -(-warps // device.multiprocessors)) / SCHEDULERS
    # Fewer warps than schedulers: the time of one.
    cycles = max(warps * issued / schedulers * max(1.0, PACE / at_once), PACE * issued)
    return cycles / device.clock


def seconds(issue: float, moved: int, device: Device) -> float:
    return max(LEAST, (issue**2 + (moved / device.bandwidth) ** 2) ** 0.5)


def moved_bytes(case: CompileCase) -> int:
    """Of each tensor argument, but for those that a router without noise does not read."""
    values = case.launch.values
    unread = ("noise_ptr", "eps_ptr", "grad_noise_ptr") if values.get("NOISE") == 0 else ()
    given = [v for name, v in values.items() if isinstance(v, Tensor) and name not in unread]
    return sum(tensor.numel() * tensor.element_size() for tensor in given)


def line(case: CompileCase, report: compile_report.Report, code: Code) -> str:
    num_warps = case.launch.options.get("num_warps", 4)
    passes = case.launch.values.get("TILES", 1)
    resident = resident_warps(report.registers, num_warps)
    warps, moved = case.launch.programs * num_warps, moved_bytes(case)
    issue = issue_seconds(warps, code.issued(passes), resident, H100)
    units = "".join(f"{code.of(unit):7}" for unit in [*UNITS, "other"])
    return (
        f"{report.registers:5}{resident:6}{(code.loop or code.once).total():7}{units}"
        f"{passes:7}{warps * code.issued(passes) / 1e6:9.2f}{1e6 * issue:8.1f}"
        f"{1e6 * moved / H100.bandwidth:8.1f}{1e6 * seconds(issue, moved, H100):8.1f}  {case.name}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.issue_slots", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="cases whose name has this text")
    parser.add_argument("--arch", type=int, default=90, help="80, 90, 100: what is compiled for")
    args = parser.parse_args(argv)
    only = args.only or ["route ", "scan", "plan", "gather"]
    chosen = [case for case in every_case() if any(text in case.name for text in only)]
    if not chosen:
        parser.error(f"--only: no case has any of {only} in its name")
    units = "".join(f"{unit:>7}" for unit in [*UNITS, "other"])
    print(
        f" regs warps   pass{units} passes  issued   issue   bytes estimate\n"
        f"      a SM  instr.{' ' * 7 * (len(UNITS) + 1)}         million"
        "      us      us      us"
    )
    for case in chosen:
        report = compile_report.compile_case(case, args.arch)
        print(line(case, report, read_code(report.sass)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
