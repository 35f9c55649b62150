"""Everything that can be wrong on a GPU, in four minutes; no times.

    python -m bench.gpu_check [--seconds 240] [--only GROUP,...] [--out DIR] [--cache DIR]
                              [--dry-run]

Groups run one after another, the ones of most worth first, each in a process of its own with a
time limit (``children``), so that one that hangs takes no more than twice its share: kernels are
compiled on all cores, each kernel is compared with float64 at the paper's size, a ragged one and a
large one; padded graphs are compared on networks of timm and torchvision; hubs with a policy, a
newcomer, a room that they do not fit into, on a shelf's features, frozen or on two ranks with the
same hub elsewhere; executors on small networks; kernels are repeated, captured and replayed;
captures fail on purpose; then come the GPU tests, the memory checker, exported packages, and the
tests that torch compiles for, the slowest. DIR gets ``check.jsonl``, a line a result as it comes,
and ``check.log``, what the groups print. Standard output ends with a table, failures first. Exit
status: 0 if all went well, 1 if something failed or was skipped, 2 if there is no GPU. In a copy of
which git knows nothing, or an older commit, the variable HUBPATH_COMMIT names it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import (
    check_batch_norm,
    check_draws,
    check_executors,
    check_export,
    check_kernels,
    check_models,
    check_padding,
    check_ranks,
    check_resident,
    check_shelf,
    children,
    jsonl,
    precompile,
    pytest_lines,
    records,
    timing,
)
from .check_operations import CASES
from .children import NO_GPU, Group, Writer
from .inputs import Size
from .records import ROOT

SANITIZERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
KERNELS = {
    "router": ("route",),
    "gather": ("gather", "images", "into"),
    "aggregate": ("aggregate", "aggregate maps", "aggregate+loss", "aggregate+router"),
    "combine": ("combine", "loss", "combine+loss", "total loss"),
}
NORM = "batch norm"
# Numbered noise: of the paper, of one expert more than a lane holds, of three launches.
DRAWS = (Size(48, 5, 2, 1), Size(37, 7, 3, 1), Size(5000, 64, 2, 1))
ALWAYS = ("machine", "compile")


@dataclass(frozen=True)
class Place:
    """What checks run on: a GPU. Tests take a CPU, small cases, and stand-ins for graphs."""

    device: str = "cuda"
    cases: tuple[check_kernels.Case, ...] = tuple(check_kernels.cases_of(CASES, CASES))
    glues: tuple[tuple[int, int, int, int], ...] = ((48, 5, 2, 100), (512, 16, 2, 1000))
    draws: tuple[Size, ...] = DRAWS
    repeats: int = 200
    waits_forbidden: Callable = check_kernels.waits_are_errors
    record: Callable = check_kernels.record_graph
    executors: tuple[str, ...] = ("graphs", "streams")
    make_hub: check_executors.MakeHub = check_executors.make_hub
    read: Callable = check_executors.read_on_host
    capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing
    width: int = check_resident.WIDTH
    connection: str = "cpu:gloo,cuda:nccl"
    shelves: dict[str, check_shelf.Shelf] = field(default_factory=lambda: check_shelf.SHELVES)

    def named(self, names: tuple[str, ...]) -> list[check_kernels.Case]:
        return [case for case in self.cases if case[0] in names]


def groups(place: Place) -> list[Group]:
    """In order of worth."""

    def group(name: str, seconds: float, body: Callable, about: str, **options) -> Group:
        return Group(name, seconds, functools.partial(body, place), about, **options)

    kernels = [
        group(name, seconds, functools.partial(values, names), f"float64: {', '.join(names)}")
        for (name, names), seconds in zip(KERNELS.items(), (6, 5, 5, 5), strict=True)
    ]
    about = f"float64: {NORM}; statistics, replays of other counts"
    kernels.append(group(NORM, 8, norms, about))
    return [
        group("machine", 4, machine, "the GPU, versions, compilers", needed=True),
        group("compile", 20, compile_kernels, "all kernels, on all cores"),
        *kernels,
        group("padding", 22, padding, f"padded to sizes: {', '.join(check_padding.NETWORKS)}"),
        group("models", 9, models, f"{', '.join(check_models.CHANGES)}, frozen"),
        group(
            "shelf", 9, shelf, f"training steps of heads on features: {', '.join(place.shelves)}"
        ),
        group("resident", 8, resident, "a hub larger than its room; copies beside the experts"),
        group("executors", 16, executors, f"{' and '.join(place.executors)} against sequential"),
        group("glue", 12, glue, f"{place.repeats} repeats, host waits, capture and replay"),
        group("captures", 9, captures, "captures that fail, and what comes after"),
        group("ranks", 9, ranks, f"two on one GPU; one by {place.connection}"),
        group("tests", 55, tests, f"pytest: {' '.join(path.stem for path in gpu_tests())}"),
        group("memory", 28, memory, "compute-sanitizer on small cases, where it is installed"),
        group("export", 18, export, f"packages of a hub: {', '.join(check_export.FORMS)}"),
        group("inductor", 38, inductor, f"pytest: {' '.join(INDUCTOR)}"),
    ]


def machine(place: Place, write: Writer, seconds: float) -> None:
    timing.refuse_interpreter()
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    properties = torch.cuda.get_device_properties(0)
    arch, memory = properties.major * 10 + properties.minor, properties.total_memory
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compilers = {"gcc": shutil.which("gcc") is not None, "Python.h": header.exists()}
    found = [f"{name} {'found' if there else 'MISSING'}" for name, there in compilers.items()]
    text = f"{properties.name}, sm_{arch}, {memory >> 30} GiB, {precompile.cores()} cores, "
    write("machine", arch=arch, memory=memory, text=text + ", ".join(found))


def compile_kernels(place: Place, write: Writer, seconds: float) -> None:
    """Forks its workers, so it leaves CUDA alone until they are done."""
    arch = next(row["arch"] for row in reversed(jsonl.read(write.files.rows)) if "arch" in row)
    start, workers = time.monotonic(), precompile.cores()
    failed = precompile.compile_all(arch, workers)
    text = f"sm_{arch}, {workers} workers, {time.monotonic() - start:.1f} s"
    write("kernels", ok=failed == 0, text=text + " (see the log)" * bool(failed))


def values(names: tuple[str, ...], place: Place, write: Writer, seconds: float) -> None:
    cases = place.named(names)
    check_kernels.values(write, cases, place.device, "triton")
    sizes = [size for name, _, size in cases if name == "route"]
    if sizes:
        check_kernels.drawn_noise(write, sizes, place.device, "triton")
        check_draws.numbered(write, place.draws, place.device, "triton")


def norms(place: Place, write: Writer, seconds: float) -> None:
    cases = place.named((NORM,))
    arguments = (write, cases, place.device, "triton")
    check_kernels.values(*arguments)
    check_batch_norm.statistics(*arguments)
    check_batch_norm.replays(*arguments, place.record)


def glue(place: Place, write: Writer, seconds: float) -> None:
    # The paper's size and the ragged one of each; the large ones would take most of the time.
    cases = [case for case in place.cases if case[2].n <= 48]
    arguments = (write, cases, place.glues[0], place.device, "triton")
    check_kernels.no_waits(*arguments, place.waits_forbidden)
    check_kernels.replays(write, place.glues, place.device, "triton", place.record)
    check_kernels.repeats(*arguments, place.repeats)


def executors(place: Place, write: Writer, seconds: float) -> None:
    check_executors.agreement(write, place.executors, place.device, place.make_hub)
    names = ["sequential", *place.executors]
    check_executors.dropout(write, names, place.device, place.make_hub)


def padding(place: Place, write: Writer, seconds: float) -> None:
    check_padding.agreement(write, place.device, place.make_hub)
    check_padding.drawing(write, place.device, place.make_hub)


def models(place: Place, write: Writer, seconds: float) -> None:
    names = ("sequential", *place.executors[:1])
    check_models.changed(write, names, place.device, place.make_hub)
    check_models.frozen(write, place.device, place.make_hub, place.executors[0])


def shelf(place: Place, write: Writer, seconds: float) -> None:
    check_shelf.steps(write, place.device, "triton", place.shelves)


def resident(place: Place, write: Writer, seconds: float) -> None:
    if place.device == "cuda":
        check_resident.overlap(write, place.device)
    check_resident.agreement(write, place.device, place.width)


def ranks(place: Place, write: Writer, seconds: float) -> None:
    check_ranks.agreement(write, place.device, place.connection)


def export(place: Place, write: Writer, seconds: float) -> None:
    check_export.packages(write, place.device)


def captures(place: Place, write: Writer, seconds: float) -> None:
    check = check_executors.capture_failures
    check(write, place.device, place.make_hub, read=place.read, capturing=place.capturing)


WANTING = re.compile(r"mark\.(gpu|either)\b")
# Of most worth, should time not do for all.
FIRST = ("test_graphs_gpu", "test_resident_gpu", "test_gpu_batch_norm", "test_atari_captured",
         "test_executors")  # fmt: skip
INDUCTOR = (
    "tests/kernels/test_gpu_outputs.py::test_compiled_by_inductor",
    "tests/kernels/test_gpu_batch_norm.py::test_compiled_by_inductor",
)


def gpu_tests() -> list[Path]:
    """The test files that want a GPU, by name: collecting all tests takes half a minute."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: path.stem not in FIRST)
    return [path for path in files if WANTING.search(path.read_text())]


def tests(place: Place, write: Writer, seconds: float) -> None:
    # In parallel: most of the time is compiling. Each takes half a gigabyte of the GPU.
    deselected = [f"--deselect={name}" for name in INDUCTOR]
    become_pytest(write, 14, *deselected, *map(str, gpu_tests()))


def inductor(place: Place, write: Writer, seconds: float) -> None:
    become_pytest(write, 6, *INDUCTOR)  # one a test


def become_pytest(write: Writer, workers: int, *chosen: str) -> None:
    """Becomes pytest, whose plugin ``bench.pytest_lines`` writes a line for each test.

    workers: at most so many, and no more than there are cores.
    """
    pytest_lines.prepare(write)
    # Each worker would start as many processes to compile in as there are cores.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.chdir(ROOT)
    workers = min(workers, precompile.cores())
    os.execv(sys.executable, [
        sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-m", "gpu or either",
        "-p", "no:cacheprovider", "--continue-on-collection-errors", "-p", "bench.pytest_lines",
        *chosen,
    ])  # fmt: skip


def memory(place: Place, write: Writer, seconds: float) -> None:
    """compute-sanitizer over ``bench.check_kernels``: bounds, then races."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), *SANITIZERS])
    tool = shutil.which("compute-sanitizer", path=folders)
    if tool is None:
        write("compute-sanitizer", skipped="not installed: nothing was checked")
        return
    # Each tensor by itself: within the allocator's large blocks nothing is out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m"]
        done = subprocess.run(
            [*command, "bench.check_kernels"], cwd=ROOT, env=environment, capture_output=True,
            text=True, preexec_fn=functools.partial(children.die_with, os.getpid()),
        )  # fmt: skip
        print(done.stdout, done.stderr, flush=True)
        write(kind, **sanitized(done.returncode, done.stdout + done.stderr))


def sanitized(status: int, output: str) -> dict:
    """What compute-sanitizer's output says, as values of a line."""
    said = [line.strip("= ") for line in output.splitlines() if line.startswith("=====")]
    summary = next((line for line in reversed(said) if "SUMMARY" in line), "no summary")
    if status == 0:
        return {"text": summary}
    first = next((line for line in said if "SUMMARY" not in line and "SANITIZER" not in line), "")
    return {"ok": False, "note": f"status {status}: {summary}; first: {first}"[:300]}


def stamp(place: Place) -> dict:
    return records.environment(place.device)


def main(
    argv: list[str] | None = None,
    place: Place | None = None,
    runner: children.Runner | None = None,
) -> int:
    start = children.begun(argv)
    place = place or Place()
    parser = children.arguments("bench.gpu_check", __doc__.split("\n")[0], seconds=240)
    every = groups(place)
    names = [group.name for group in every if group.name not in ALWAYS]
    parser.add_argument(
        "--only", type=children.some_of(names), default=names,
        help=f"of {','.join(names)}; default: all",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not args.dry_run:
        with contextlib.suppress(ImportError):  # their checks will say so
            import timm  # noqa: F401  here, before the groups' processes are forked
    every = [group for group in every if group.name in (*ALWAYS, *args.only)]
    stamped = functools.partial(stamp, place)
    return children.command(args, "check", every, stamped, start, runner)


if __name__ == "__main__":
    sys.exit(main())
