"""Every time that goals are about, on a GPU, in under four minutes.

    python -m bench.gpu_speed [--seconds 220] [--only step,roof,glue,atari,cpu] [--out DIR]
                              [--cache DIR] [--dry-run]

Both ceilings come first (a large copy, a bf16 product), then the paper's step (48 images of 224
pixels, five ResNet-50, K = 2, bf16): one single network, eager and captured; the hub with experts
one after another, on streams, and as captured graphs on 1, 2 and 8 streams; dense and reference.
Then the glue, kernels at sizes that fill the GPU, and the networks of Atari. Each row has times of
whole calls and what the device did meanwhile: seconds busy, launches, the five dearest kernels.

``cpu``, only where it is asked for, measures executors on 1, 2, 4, 8 and 16 of the host's threads
and needs no GPU. Groups, files and exit status are as of ``bench.gpu_check``: DIR gets
``speed.jsonl`` and ``speed.log``. Run that first: nothing that is wrong is timed, but it tells why.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hubpath_fast._onednn import enlarge_primitive_cache

from . import children, glue, gpu_check, jsonl, ops, precompile, records, speed_step, timing
from .children import Group, Writer
from .operations import Size
from .step_models import PRESETS

PARTS = ("step", "glue", "roof", "atari", "cpu")
LANES = (8, 1, 2)
THREADS = (1, 2, 4, 8, 16)
SINGLES = ("single 0", "captured single 0")  # beside each group of graphs: clocks may drift
ON_CPU = (*(f"single {i}" for i in range(5)), "reference", "sequential", "threads")


@dataclass(frozen=True)
class Place:
    """What is measured, and where. Tests take a CPU and small sizes."""

    device: str = "cuda"
    step: tuple[str, int] = ("homogeneous", 224)  # preset, pixels
    step_rows: tuple[str, ...] = (*SINGLES, "sequential", "streams", "dense", "reference", "glue",
                                  "generator")  # fmt: skip
    graph_rows: tuple[str, ...] = SINGLES
    atari_rows: tuple[str, ...] = (*SINGLES, "sequential", "streams", "graphs", "dense",
                                   "reference")  # fmt: skip
    glues: tuple[tuple[int, int, int, int], ...] = tuple(glue.SIZES)
    roof: tuple[tuple[str, Size], ...] = tuple(
        (name, size) for name, sizes in ops.ROOF.items() for size in sizes
    )
    cpu: tuple[str, int] = ("tiny", 96)

    @property
    def backend(self) -> str:
        return "triton" if self.device == "cuda" else "torch"


def groups(place: Place, only: Sequence[str]) -> list[Group]:
    """In order of worth."""

    def group(name: str, seconds: float, body: Callable, *arguments, about: str = "") -> Group:
        return Group(name, seconds, functools.partial(body, place, *arguments), about)

    preset, px = place.step
    found = []
    if set(only) - {"cpu"}:
        machine = functools.partial(gpu_check.machine, gpu_check.Place())
        compiling = functools.partial(gpu_check.compile_kernels, gpu_check.Place())
        found += [
            Group("machine", 6, machine, "the GPU, versions, compilers", needed=True),
            Group("compile", 8, compiling, "all kernels, on all cores, unless they are there"),
            group("ceilings", 4, ceilings, about="the fastest copy, a bf16 product"),
        ]
    if "step" in only:
        rows = place.step_rows
        found.append(group("step", 48, steps, preset, px, rows, about=", ".join(rows)))
        for lanes in LANES:
            rows = (*place.graph_rows, f"graphs, {lanes} lane{'s' * (lanes > 1)}")
            about = "; ".join(rows)
            found.append(group(f"graphs {lanes}", 27, steps, preset, px, rows, about=about))
    if "glue" in only:
        found.append(group("glue", 16, glues, about=" ".join(map(str, place.glues))))
    if "roof" in only:
        text = ", ".join(f"{name} {size.n}" for name, size in place.roof)
        found.append(group("roof", 24, roofs, about=text))
    if "atari" in only:
        rows = place.atari_rows
        found.append(group("atari", 20, steps, "atari", 84, rows, about=", ".join(rows)))
    if "cpu" in only:
        for threads in THREADS:
            if threads <= precompile.cores():
                text = f"{place.cpu[0]} hub, {place.cpu[1]} px, {', '.join(ON_CPU)}"
                planned = 60 if threads <= 2 else 22
                found.append(group(f"cpu {threads}", planned, on_cpu, threads, about=text))
    return found


def ceilings(place: Place, write: Writer, seconds: float) -> None:
    rates = timing.copy_rates(place.device)
    way, rate = max(rates.items(), key=lambda item: item[1])
    text = f"{rate / 1e12:.3f} TB/s read and written, by {way}"
    write("copy", bytes_per_second=rate, rates=rates, text=text)
    rate = timing.product_rate(place.device)
    write("bf16 product", flops_per_second=rate, text=f"{rate / 1e12:.0f} TFLOP/s")


def steps(
    place: Place, preset: str, px: int, rows: Sequence[str], write: Writer, seconds: float
) -> None:
    speed_step.measure(write, PRESETS[preset], px, rows, place.device, seconds)


def glues(place: Place, write: Writer, seconds: float) -> None:
    # Two ways of measuring, and checks, compilation and the profile beside them.
    each, ours = seconds / len(place.glues) / 4, {}
    for size in place.glues:
        text = ",".join(map(str, size))
        try:
            for row in glue.measure(size, place.device, each, False):
                name = f"{text} {row['row']} {row.get('mode', '')}".strip()
                if "note" in row:
                    write(name, ok=False, **row)
                    continue
                write(name, text=say(row), **row)
                if (row["row"], row["mode"]) == (place.backend, "eager"):
                    ours[size] = name, row
        except Exception as error:
            write(text, ok=False, note=children.first_line(error))
    # The profiler may stay attached and slow every launch after it: all is timed by now.
    for size, (name, row) in ours.items():
        step = glue.step(glue.make(*size, place.device), place.backend)
        if values := speed_step.profiled(step, place.device, calls=5):
            write(name, text=say(row | values), **row | values)


def roofs(place: Place, write: Writer, seconds: float) -> None:
    known = [row for row in jsonl.read(write.files.rows) if row["name"] == "copy"]
    copy = known[-1]["bytes_per_second"] if known else timing.copy_bandwidth(place.device)
    each = seconds / len(place.roof) / 10  # two directions, two ways, and the float64 check
    for name, size in place.roof:
        text = f"{name} {','.join(map(str, size[:4]))} {size.dtype}"
        try:
            found = ops.measure(
                name, size, place.device, each, False, copy, [place.backend], DIRECTIONS
            )
        except Exception as error:
            write(text, ok=False, note=children.first_line(error))
            continue
        for row in found:
            if "note" in row:
                write(text, ok=False, **row)
            else:
                write(f"{text} {row['direction']} {row['mode']}", text=say(row), **row)


DIRECTIONS = ("forward", "backward")


def on_cpu(place: Place, threads: int, write: Writer, seconds: float) -> None:
    torch.set_num_threads(threads)
    write = Writer(write.files, write.group, functools.partial(records.environment, "cpu"))
    enlarge_primitive_cache()
    preset, px = place.cpu
    speed_step.measure(write, PRESETS[preset], px, ON_CPU, "cpu", seconds)


def say(row: dict) -> str:
    """A row of ``glue`` or ``ops`` in few words."""
    text = [f"{row['p50'] * 1e6:.1f} us"]
    if row.get("speedup"):
        text.append(f"{row['speedup']:.2f} x reference")
    if "share_of_copy" in row:
        text.append(f"{row['share_of_copy']:.0%} of copy")
    return ", ".join([*text, *speed_step.say_profile(row, 1e6, 1)])


def parse(argv: list[str] | None):
    parser = children.arguments("bench.gpu_speed", __doc__.split("\n")[0], seconds=220)
    parser.add_argument(
        "--only", default=",".join(part for part in PARTS if part != "cpu"),
        help=f"of {','.join(PARTS)}; default all but cpu",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    unknown = set(args.only) - set(PARTS)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return args


def main(
    argv: list[str] | None = None,
    place: Place | None = None,
    runner: children.Runner | None = None,
) -> int:
    start, args = children.begun(argv), parse(argv)
    timing.refuse_interpreter()
    if not args.dry_run and set(args.only) & {"step", "cpu"}:
        with contextlib.suppress(ImportError):  # their rows will say so
            import timm  # noqa: F401  here, before the groups' processes are forked
    place = place or Place()
    stamp = functools.partial(records.environment, place.device)
    return children.command(args, "speed", groups(place, args.only), stamp, start, runner)


if __name__ == "__main__":
    sys.exit(main())
