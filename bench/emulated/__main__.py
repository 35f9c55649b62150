"""Runs a Python program on the emulated CUDA device: ``python -m bench.emulated -m MODULE ARGS``.

As on a device ``torch.cuda.is_available()`` is true and every CUDA path of torch and of this
package is taken, also in processes that the program starts; the arithmetic is the CPU's, and
Triton's kernels are interpreted, or compiled and emulated. See ``bench.emulated.device``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .device import library, start

ROOT = Path(__file__).resolve().parents[2]


def environment(kernels: str = "interpreted", report: bool = False) -> dict[str, str]:
    """Of a process that is to see the device. kernels: one of ``start.KINDS``."""
    site = Path(start.__file__).parent / "site"
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, start.SWITCH: "1", start.KERNELS: kernels}
    found["TRITON_INTERPRET"] = "0" if kernels == "compiled" else "1"
    found["PYTHONPATH"] = os.pathsep.join(paths)
    if report:
        found[start.REPORT] = "1"
    return found


def _parse(
    parser: argparse.ArgumentParser, given: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the program with everything behind it, whose options are its own."""
    at = 0
    while at < len(given) and given[at].startswith("--"):
        at += 2 if given[at] == "--kernels" else 1
    if at < len(given) and given[at] == "-h":
        at += 1
    return parser.parse_args(given[:at]), given[at:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="run a Python program on an emulated CUDA device",
        usage="python -m bench.emulated [options] (-m MODULE | -c CODE | FILE) [ARGS ...]",
    )
    parser.add_argument(
        "--kernels",
        choices=start.KINDS,
        default="interpreted",
        help="interpreted: Triton's, one program after the other (a batch of photographs takes "
        "minutes); compiled: for sm_90, and their instructions emulated; torch: torch's operators "
        "in their place (default: %(default)s)",
    )
    parser.add_argument(
        "--report", action="store_true", help="print host waits and races when a process ends"
    )
    args, program = _parse(parser, sys.argv[1:])
    if not program:
        parser.error("give a program: -m MODULE, -c CODE or a file")
    try:
        library.build()
    except RuntimeError as error:
        sys.exit(str(error))
    os.execve(sys.executable, [sys.executable, *program], environment(args.kernels, args.report))


if __name__ == "__main__":
    main()
