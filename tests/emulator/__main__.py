"""Run the cases: ``python -m tests.emulator [--only TEXT] [--list]``.

One line a case: what it is, its time and kernels, ``ok`` or what is wrong. Exit status 1 if any
case fails.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

import torch

from .cases import CASES
from .driver import emulated


def run(name: str) -> dict:
    """One case: ``failure`` is None or what is wrong, in words."""
    torch.set_num_threads(1)  # small tensors: threads only wait for each other
    began, failure = time.perf_counter(), None
    with emulated() as device:
        try:
            CASES[name]()
        except Exception:
            failure = traceback.format_exc()
    seconds = time.perf_counter() - began
    return {"failure": failure, "launches": device.launches, "seconds": seconds}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.emulator", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="cases whose name has this text")
    parser.add_argument("--list", action="store_true", help="names of the cases, nothing run")
    args = parser.parse_args(argv)
    chosen = [n for n in CASES if not args.only or any(text in n for text in args.only)]
    if not chosen:
        parser.error(f"--only: no case has any of {args.only} in its name")
    failed = 0
    for name in chosen:
        if args.list:
            print(name)
            continue
        result = run(name)
        failed += result["failure"] is not None
        verdict = result["failure"] or "ok"
        print(f"{result['seconds']:6.2f} s  {name:52} {verdict}", flush=True)
        if result["failure"] is None and result["launches"]:
            print(f"          {' '.join(result['launches'])}", flush=True)
    print(f"{len(chosen)} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
