"""Compile every kernel for real GPUs, without one, and say what the compiler made of it.

    python -m bench.compile_report [--arch 80 --arch 90 --arch 100] [--only TEXT] [--json FILE]

For each case (a kernel at a representative size): registers a thread, bytes of stack, instructions
that use local memory (LDL, STL: spilled registers), shared memory, barriers, and how many global
loads and stores of each width. A case fails if it has a stack or spills, or if, where its size
allows it (``CompileCase.wide``), none of its loads or none of its stores is 128 bits wide. There
is no exception for noise drawn in a kernel: it avoids ``tl.randn``, whose cosine needs a stack.
Exit status 1 if any case fails.

What cannot be seen here is time. Assertions on the device (exploit loss) are compiled out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import timing
from .compile_cases import CompileCase, every_case

ARCHITECTURES = (80, 90, 100)
# Kernels that reduce: a sample's M scores to K experts, a row's C outputs to one number, what a
# channel has to sums. They store a few numbers of each, so only their loads have to be wide.
FEW_STORES = (
    "route no eps", "route eps", "route draw", "exploit loss forward", "norm statistics",
    "norm sums of the gradient",
)  # fmt: skip


@dataclass
class Report:
    """What one case compiled to for one architecture."""

    case: str
    arch: int
    registers: int
    stack: int  # bytes a thread
    local_loads: int  # LDL: spills, or arrays that did not fit in registers
    local_stores: int  # STL
    shared: int  # bytes a block, with what Triton asks for at launch
    barriers: int  # BAR.SYNC instructions
    loads: dict[int, int] = field(default_factory=dict)  # width in bits -> instructions
    stores: dict[int, int] = field(default_factory=dict)
    note: str = ""
    failures: list[str] = field(default_factory=list)
    sass: str = field(default="", repr=False)  # the machine code, as cuobjdump prints it


def compile_case(case: CompileCase, arch: int) -> Report:
    """Compile one case and read the binary. Raises RuntimeError under the interpreter."""
    timing.refuse_interpreter()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, (signature, constants, aligned) = case.launch.kernel, case.specialised()
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in aligned},
    )
    asked = case.launch.options
    options = {"num_warps": asked.get("num_warps", 4), "num_stages": asked.get("num_stages", 3)}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    counts = read_usage(usage) | read_sass(sass)
    report = Report(case.name, arch, note=case.note, sass=sass, **counts)
    report.shared = max(report.shared, compiled.metadata.shared)
    report.failures = judge(report, case.wide)
    return report


def read_usage(text: str) -> dict[str, int]:
    """Registers, stack and shared memory from ``cuobjdump --dump-resource-usage``."""
    found = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": int(found["SHARED"]),
    }


_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def read_sass(text: str) -> dict:
    """Counts of local and global accesses and barriers from ``cuobjdump --dump-sass``."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    local: Counter[str] = Counter()
    barriers = 0
    for name in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text, re.M):
        operation, *modifiers = name.split(".")
        if operation in ("LDL", "STL"):
            local[operation] += 1
        elif operation == "BAR":
            barriers += "SYNC" in modifiers
        elif operation in ("LDG", "STG", "LDGSTS"):
            width = next((_WIDTHS[m] for m in reversed(modifiers) if m in _WIDTHS), 32)
            (stores if operation == "STG" else loads)[width] += 1
    return {
        "local_loads": local["LDL"],
        "local_stores": local["STL"],
        "barriers": barriers,
        "loads": dict(sorted(loads.items())),
        "stores": dict(sorted(stores.items())),
    }


def judge(report: Report, wide: bool) -> list[str]:
    """What is wrong with a report, in words; nothing for a good one."""
    wrong = []
    if report.local_loads or report.local_stores:
        wrong.append(f"spills: {report.local_loads} LDL, {report.local_stores} STL")
    if report.stack:
        wrong.append(f"a stack of {report.stack} bytes")
    if wide:
        bulk = {"loads": report.loads}
        if not report.case.startswith(FEW_STORES):
            bulk["stores"] = report.stores
        for name, widths in bulk.items():
            if max(widths, default=0) < 128:
                wrong.append(f"narrow {name}: at most {max(widths, default=0)} bits")
    return wrong


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [str(tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def line(report: Report) -> str:
    def widths(found: dict[int, int]) -> str:
        return " ".join(f"{count}x{width}" for width, count in found.items())

    text = (
        f"sm_{report.arch:<4}{report.registers:5}{report.stack:6}{report.local_loads:5}"
        f"{report.local_stores:5}{report.shared:8}{report.barriers:5}  "
        f"{widths(report.loads):30} {widths(report.stores):24} {report.case}"
    )
    return text + "".join(f"\n        FAILS: {failure}" for failure in report.failures)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.compile_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", type=int, action="append", help="80, 90, 100; may be repeated")
    parser.add_argument("--only", action="append", help="cases whose name has this text")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    args = parser.parse_args(argv)
    chosen = [c for c in every_case() if not args.only or any(text in c.name for text in args.only)]
    if not chosen:
        parser.error(f"--only: no case has any of {args.only} in its name")
    print("arch      regs stack  LDL  STL  shared  bar  global loads (count x bits)    stores")
    reports = []
    for case in chosen:
        for arch in args.arch or ARCHITECTURES:
            reports.append(compile_case(case, arch))
            print(line(reports[-1]), flush=True)
    failed = [report for report in reports if report.failures]
    print(f"{len(reports)} compiled, {len(failed)} fail")
    if args.json:
        kept = [{k: v for k, v in asdict(report).items() if k != "sass"} for report in reports]
        args.json.write_text(json.dumps(kept, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
