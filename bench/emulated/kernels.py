"""Every kernel as compiled for a GPU, run and watched on a CPU, against float64.

    python -m bench.emulated.kernels [--only TEXT ...] [--sm 90] [--json FILE] [--list]

The operations of ``check_operations`` at the sizes that a GPU checks, the large ones cut down, by
the functions that check them there; each twice, launched by Triton and from the plan that an
operation keeps; then those that have no times of their own (``checks``). Memory that nothing wrote
is NaN. What the emulator finds is a failure like a wrong value: accesses out of
bounds, misaligned, of shared memory that nothing wrote, races (``ptx``).

A line a check: its seconds, its error, how often kernels were launched. Exit status 1 if one fails,
or if a kernel of the package was never launched; FILE gets the lines as JSON.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton

from .. import jsonl, records
from ..children import first_line
from ..no_device import cpu_tensors_go_to_kernels
from .checks import Check, checks
from .ptx.driver import Device, emulated


@contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(name: str, check: Check, device: Device) -> list[dict]:
    """The rows of one check, in an ``emulated`` that keeps plans."""
    rows: list[dict] = []
    begun, launched, kept = time.perf_counter(), len(device.launches), device.kept

    def write(text: str, /, ok: bool = True, **values: object) -> None:
        nonlocal begun, launched, kept
        now = time.perf_counter()
        rows.append(
            {
                "check": text, "ok": ok, "seconds": now - begun,
                "launches": len(device.launches) - launched, "kept": device.kept - kept,
                **{key: values[key] for key in ("error", "text", "note") if key in values},
            }
        )  # fmt: skip
        begun, launched, kept = time.perf_counter(), len(device.launches), device.kept

    try:
        with _uninitialised_is_nan(), cpu_tensors_go_to_kernels():
            check(write)
    except Exception as problem:
        write(name, ok=False, note=first_line(problem))
    return rows


def entry_kernels() -> set[str]:
    """Names of the package's kernels that are launched: those that no other one calls."""
    from hubpath_fast import kernels

    defined, called = set(), set()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                defined.add(node.name)
                calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
                names = {call.id for call in calls if isinstance(call, ast.Name)}
                # A function may also be given to another one: of reductions, what joins two.
                names |= {arg.id for arg in ast.walk(node) if isinstance(arg, ast.Name)}
                called |= names - {node.name}
    return defined - called


def _is_jit(decorator: ast.expr) -> bool:
    decorator = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(decorator) == "triton.jit"


def _line(row: dict) -> str:
    error = f"error {row['error']:.1e}" if "error" in row else ""
    said = row.get("note") or row.get("text") or error
    kept = f", {row['kept']} kept" if row["kept"] else ""
    verdict = "ok  " if row["ok"] else "FAIL"
    launches = f"{row['launches']} launches{kept}"
    return f"{row['seconds']:6.2f} s  {verdict}  {row['check']:52} {launches:22} {said}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.emulated.kernels", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", help="checks whose name has one of these texts")
    parser.add_argument("--sm", type=int, default=90, help="what to compile for (default 90)")
    parser.add_argument("--json", type=Path, help="add the lines to this file")
    parser.add_argument("--list", action="store_true", help="names of the checks, nothing run")
    args = parser.parse_args(argv)
    found = checks()
    chosen = [n for n in found if not args.only or any(text in n for text in args.only)]
    if not chosen:
        parser.error(f"--only: no check has any of {args.only} in its name; see --list")
    if args.list:
        print("\n".join(chosen))
        return 0
    torch.set_num_threads(1)  # small tensors: threads only wait for each other
    rows: list[dict] = []
    start = time.perf_counter()
    with emulated(args.sm, keep=True) as device:
        for name in chosen:
            new = run(name, found[name], device)
            print("\n".join(map(_line, new)), flush=True)
            if args.json:
                common = {"benchmark": "emulated kernels", "sm": args.sm}
                jsonl.write(args.json, [{**common, **row, **_versions()} for row in new])
            rows += new
    failed = sum(not row["ok"] for row in rows)
    missing = sorted(entry_kernels() - set(device.launches)) if not args.only else []
    if missing:
        print(f"never launched: {', '.join(missing)}")
    launches = f"{len(device.launches)} launches, {device.kept} of them from kept plans"
    seconds = time.perf_counter() - start
    print(f"{len(rows)} checks, {failed} failed; {launches}; {seconds:.0f} s")
    return 1 if failed or missing else 0


def _versions() -> dict[str, object]:
    return {"torch": torch.__version__, "triton": triton.__version__, "commit": records.commit()}


if __name__ == "__main__":
    sys.exit(main())
