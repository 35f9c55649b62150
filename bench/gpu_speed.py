"""Every time that goals are about, on a GPU, in five minutes.

    python -m bench.gpu_speed [--seconds 300] [--only step,glue,...] [--out DIR] [--cache DIR]
                              [--dry-run]

Ceilings come first (the fastest large copies, a bf16 product), then the parts that --only names,
those of most worth first:

- ``step``: the paper's step (48 images of 224 pixels, five ResNet-50, K = 2, bf16): one single
  network, eager and captured; the hub with experts one after another, on streams, and as captured
  graphs on 8, 2 and 1 streams; dense and reference; single steps on routings that change.
- ``glue``, ``aggregate``, ``roof``: the glue; the aggregate against its dense form; kernels at
  sizes that fill the GPU.
- ``atari``, ``large``: steps of an Atari agent, eager and captured, and the step of its hub in
  other ways; the paper's with 256 images.
- ``growth``: how a step of small networks grows from M = 4 to 64; ``predict``: one image and 64.
- ``resident``: predictions of a hub that is larger than its room, by how often experts are there;
  ``shelf``: training steps of 256 heads on features, in one launch and one after another.
- ``compiled``: the reference's glue under torch.compile, which takes half a minute to compile.
- ``cpu``, only where it is asked for: executors on 1, 2, 4, 8 and 16 of the host's threads; it
  needs no GPU.

Parts that ``results/DEVICE/gpu.jsonl`` has nothing of for this device come first of all: should
time not do, holes are filled before known rows are measured again. Steps have times of whole cycles
of routings and what the device did meanwhile: seconds busy, launches, the five dearest kernels.
Groups, files and exit status are as of ``bench.gpu_check``: DIR
gets ``speed.jsonl`` and ``speed.log``. Run that first: nothing that is wrong is timed, but it tells
why.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from hubpath_fast._onednn import enlarge_primitive_cache
from hubpath_fast.executors.graphs.backend import CudaBackend

from . import (
    agent_step,
    children,
    glue,
    gpu_check,
    gpu_rows,
    jsonl,
    ops,
    precompile,
    predictions,
    records,
    speed_resident,
    speed_shelf,
    speed_step,
    step_growth,
    step_stream,
    timing,
)
from .check_shelf import SHELVES, Shelf
from .children import Group, Writer
from .inputs import Size
from .speed_resident import HIT_RATES
from .step_models import PRESETS, timm_experts

PARTS = ("step", "glue", "aggregate", "roof", "atari", "large", "resident", "shelf", "growth",
         "predict", "compiled", "cpu")  # fmt: skip
WITH_NETWORKS = {"step", "large", "resident", "growth", "predict", "cpu"}  # timm's
BEGINNING = ("machine", "compile", "ceilings")
LANES = (8, 2, 1)
THREADS = {1: 24, 2: 24, 4: 16, 8: 16, 16: 16}  # of the host, and planned seconds
SINGLES = ("single 0", "captured single 0")  # beside each group of graphs: clocks may drift
ON_CPU = ("reference", "sequential", "threads")
ROUNDS = 3  # of growth: a step of 64 experts is long


def resident_experts() -> list[nn.Module]:
    return timm_experts(("resnet50",) * speed_resident.EXPERTS, 100)


@dataclass(frozen=True)
class Place:
    """What is measured, and where. Tests take a CPU and small sizes."""

    device: str = "cuda"
    step: tuple[str, int] = ("homogeneous", 224)  # preset, pixels
    step_rows: tuple[str, ...] = (*SINGLES, "sequential", "streams", "dense", "reference", "glue",
                                  "generator")  # fmt: skip
    graph_rows: tuple[str, ...] = SINGLES
    stream_steps: int = 240
    # Without "graphs": noisy networks are not captured, but an agent's whole update is.
    atari_rows: tuple[str, ...] = (*SINGLES, "sequential", "streams", "dense", "reference")
    glues: tuple[tuple[int, int, int, int], ...] = tuple(glue.SIZES)
    roof: tuple[tuple[str, Size], ...] = tuple(
        (name, size) for name, sizes in ops.ROOF.items() for size in sizes
    )
    aggregate: tuple[Size, ...] = tuple(ops.ROOF["aggregate"])
    large: tuple[int, int] = (256, 2)  # samples of the paper's step; routings, each to be captured
    large_rows: tuple[str, ...] = ("single 0", "sequential", "graphs, 8 lanes")
    growth: tuple[tuple[int, int, int], ...] = ((64, 4, 2), (64, 16, 2), (64, 64, 2))  # N, M, K
    executors: tuple[str, ...] = ("sequential", "graphs")  # of growth and of predictions
    batches: tuple[int, ...] = (1, 64)  # of predictions
    resident: tuple[Callable, int, int] = (resident_experts, 224, 48)  # makes them; pixels, N
    shelf: Shelf = SHELVES["large"]
    compiled: tuple[tuple[int, int, int, int], ...] = ((48, 5, 2, 100),)
    cpu: tuple[str, int] = ("tiny", 96)
    captures: Callable = CudaBackend  # an agent's steps
    results: Path = records.RESULTS  # what is known of devices

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
            Group("compile", 14, compiling, "all kernels, on all cores, unless they are there"),
            group("ceilings", 4, ceilings, about="the fastest copies, a bf16 product"),
        ]
    if "step" in only:
        rows = place.step_rows
        found.append(group("step", 45, steps, preset, px, rows, about=", ".join(rows)))
        lanes = [f"graphs, {lanes} lane{'s' * (lanes > 1)}" for lanes in LANES]
        rows = (*place.graph_rows, *lanes)
        found.append(group("graphs", 55, steps, preset, px, rows, about="; ".join(rows)))
        about = f"single steps, {place.stream_steps} each: {', '.join(step_stream.STREAMS)}"
        found.append(group("stream", 35, streams, about=about))
    rows = place.atari_rows
    others = {
        "glue": group("glue", 9, glues, place.glues, False, about=" ".join(map(str, place.glues))),
        "aggregate": group("aggregate", 9, aggregates, about="against its dense form"),
        "roof": group(
            "roof", 10, roofs, about=", ".join(f"{n} {size.n}" for n, size in place.roof)
        ),
        "agent": group("agent", 10, agent_steps, about="from scratch and a hub, eager, captured"),
        "atari": group("atari", 12, steps, "atari", 84, rows, about=", ".join(rows)),
        "large": group(
            "large", 30, large, about=f"N = {place.large[0]}: {'; '.join(place.large_rows)}"
        ),
        "resident": group(
            "resident",
            12,
            resident,
            about=f"{speed_resident.EXPERTS} experts, room for "
            f"{speed_resident.ROOM}, found {', '.join(map('{:.0%}'.format, HIT_RATES))}",
        ),
        "shelf": group(
            "shelf", 8, shelf, about=f"{place.shelf.experts} heads, N = {place.shelf.n}"
        ),
        "growth": group("growth", 27, growth, about=" ".join(f"M={m}" for _, m, _ in place.growth)),
        "predict": group("predict", 14, predict, about=f"N = {place.batches}"),
        "compiled": group(
            "compiled", 20, glues, place.compiled, True, about="the glue under torch.compile"
        ),
    }
    asked = [*(["agent"] if "atari" in only else []), *only]
    found += [others[part] for part in others if part in asked]
    if "cpu" in only:
        for threads, planned in THREADS.items():
            if threads <= precompile.cores():
                text = f"{place.cpu[0]} hub, {place.cpu[1]} px, {', '.join(ON_CPU)}"
                found.append(group(f"cpu {threads}", planned, on_cpu, threads, about=text))
    return found


def holes_first(groups: Sequence[Group], place: Place, device: str | None) -> list[Group]:
    """The groups that a device has no times of, or not of every operation, before the others, each
    in order of worth; what every run begins with stays first. device: its name; None: unknown."""
    if device is None:
        return list(groups)
    rows = gpu_rows.newest(jsonl.read(place.results / records.slug(device) / gpu_rows.FILE))
    found = [row for row in gpu_rows.part(rows, "speed") if row["ok"]]
    known = {row["group"] for row in found} - set(BEGINNING)
    roofs = {row["name"].split()[0] for row in found if row["group"] == "roof"}
    if not roofs >= {name for name, _ in place.roof}:
        known -= {"roof"}
    return sorted(groups, key=lambda group: group.name in known)


def ceilings(place: Place, write: Writer, seconds: float) -> None:
    rates = timing.copy_rates(place.device)
    way, rate = max(rates.items(), key=lambda item: item[1])
    text = f"{rate / 1e12:.3f} TB/s read and written, by {way}"
    write("copy", bytes_per_second=rate, rates=rates, text=text)
    for mix, rates in timing.mixed_rates(place.device).items():
        way, rate = max(rates.items(), key=lambda item: item[1])
        text = f"{rate / 1e12:.3f} TB/s, by {way}"
        write(f"copy {mix}", bytes_per_second=rate, rates=rates, text=text)
    rate = timing.product_rate(place.device)
    write("bf16 product", flops_per_second=rate, text=f"{rate / 1e12:.0f} TFLOP/s")


def steps(
    place: Place, preset: str, px: int, rows: Sequence[str], write: Writer, seconds: float
) -> None:
    speed_step.measure(write, PRESETS[preset], px, rows, place.device, seconds)


def streams(place: Place, write: Writer, seconds: float) -> None:
    preset, px = place.step
    step_stream.measure(write, PRESETS[preset], px, place.device, seconds, place.stream_steps)


def agent_steps(place: Place, write: Writer, seconds: float) -> None:
    agent_step.measure(write, place.device, seconds, place.captures)


def large(place: Place, write: Writer, seconds: float) -> None:
    """The paper's step on more images; few routings, since each of their sizes is captured."""
    (preset, px), (n, recorded) = place.step, place.large
    arguments = (PRESETS[preset], px, place.large_rows, place.device, seconds)
    speed_step.measure(write, *arguments, n=n, recorded=recorded)


def glues(
    place: Place,
    sizes: Sequence[tuple[int, int, int, int]],
    compiled: bool,
    write: Writer,
    seconds: float,
) -> None:
    # Two ways of measuring, and checks, compilation and the profile beside them.
    each, ours = min(1.0, seconds / len(sizes) / 4), {}
    for size in sizes:
        text = ",".join(map(str, size))
        try:
            for row in glue.measure(size, place.device, each, compiled):
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


def aggregates(place: Place, write: Writer, seconds: float) -> None:
    """Forward and backward in one, for the peak of memory is in between."""
    rows = (place.backend, "dense", "reference")
    each = seconds / len(place.aggregate) / 8  # two ways, and the float64 check
    for size in place.aggregate:
        operation(place, write, "aggregate", size, rows, ("both",), each)


def roofs(place: Place, write: Writer, seconds: float) -> None:
    each = seconds / len(place.roof) / 10  # two directions, two ways, and the float64 check
    for name, size in place.roof:
        # Beside BatchNorm, torch's on exactly the valid rows, the sum and the activation after it.
        rows = (place.backend, *["reference"] * (size.norm is not None))
        operation(place, write, name, size, rows, ("forward", "backward"), each, True)


def operation(
    place: Place,
    write: Writer,
    name: str,
    size: Size,
    rows: Sequence[str],
    directions: Sequence[str],
    seconds: float,
    in_order: bool = False,
) -> None:
    """Lines of one operation, named by row, but for the first where it is ours alone, and direction
    where there are several, and by mode. in_order: as of ``ops``; the device's clocks before and
    after then stand in each line."""
    known = [row for row in jsonl.read(write.files.rows) if row["name"] == "copy"]
    copy = known[-1]["bytes_per_second"] if known else timing.copy_bandwidth(place.device)
    text = f"{name} {size.numbers} {size.dtype}"
    clocks = {"clocks": [records.clocks()]} if in_order else {}
    try:
        found = ops.measure(
            name, size, place.device, seconds, False, copy, rows, directions, in_order
        )
    except Exception as error:
        write(text, ok=False, note=children.first_line(error))
        return
    if in_order:
        clocks["clocks"].append(records.clocks())
    for row in found:
        row |= clocks
        if "note" in row:
            write(f"{text} {row['row']}", ok=False, **row)
            continue
        ours_alone = len(rows) == 1 or size.norm is not None
        unnamed = ours_alone and row["row"] == rows[0]
        told = [row["row"]] * (not unnamed) + [row["direction"]] * (len(directions) > 1)
        write(" ".join([text, *told, row["mode"]]), text=say(row), **row)


def growth(place: Place, write: Writer, seconds: float) -> None:
    each = seconds / len(place.executors) / len(place.growth) / 4  # building and captures take most
    for executor in place.executors:
        found = {}
        for n, m, k in place.growth:
            name, shape = f"{executor}, M={m}", {"N": n, "M": m, "K": k}
            try:
                times = step_growth.times_of(n, m, k, place.device, each, ROUNDS, executor)
            except Exception as error:
                write(name, ok=False, note=children.first_line(error), **shape)
                continue
            found[m] = {row: asdict(measured) for row, measured in times.items()}
            text = ", ".join(f"{row} {t.p50 * 1e3:.2f} ms" for row, t in times.items())
            write(name, text=text, **shape, **found[m])
        if {4, 64} <= found.keys():
            grown = step_growth.beyond_smaller_groups(found[4], found[64])
            total, beyond = grown["growth_4_to_64"], grown["growth_beyond_smaller_groups"]
            text = f"step x{total['step']:.2f}, experts alone x{total['experts alone']:.2f}, "
            write(f"{executor}, growth", text=f"{text}beyond them x{beyond:.2f}", **grown)


def resident(place: Place, write: Writer, seconds: float) -> None:
    # Making the experts and the first calls take about half of the time.
    speed_resident.measure(write, *place.resident, place.device, seconds / 2)


def shelf(place: Place, write: Writer, seconds: float) -> None:
    speed_shelf.measure(write, place.shelf, place.device, seconds / 2)


def predict(place: Place, write: Writer, seconds: float) -> None:
    preset, px = place.step
    arguments = (PRESETS[preset], px, place.executors, place.batches, place.device, seconds)
    predictions.measure(write, *arguments)


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
        text.append(timing.say_share(row["share_of_copy"]))
    if row.get("peak_memory") is not None:
        text.append(f"{row['peak_memory'] / 2**20:.0f} MiB")
    return ", ".join([*text, *speed_step.say_profile(row, 1e6, 1)])


def parse(argv: list[str] | None):
    parser = children.arguments("bench.gpu_speed", __doc__.split("\n")[0], seconds=300)
    parser.add_argument(
        "--only", type=children.some_of(PARTS), default=[part for part in PARTS if part != "cpu"],
        help=f"of {','.join(PARTS)}; default: all but cpu",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(
    argv: list[str] | None = None,
    place: Place | None = None,
    runner: children.Runner | None = None,
) -> int:
    start, args = children.begun(argv), parse(argv)
    timing.refuse_interpreter()
    if not args.dry_run and set(args.only) & WITH_NETWORKS:
        with contextlib.suppress(ImportError):  # their rows will say so
            import timm  # noqa: F401  here, before the groups' processes are forked
    place = place or Place()
    stamp = functools.partial(records.environment, place.device)
    chosen = holes_first(groups(place, args.only), place, records.gpu_name())
    return children.command(args, "speed", chosen, stamp, start, runner)


if __name__ == "__main__":
    sys.exit(main())
