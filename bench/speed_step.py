"""Rows of ``bench.gpu_speed`` that are whole training steps, on routings that are always the same.

Recorded routings are gone through in turn, so that after a few steps every group size has been met:
captured graphs need no hundreds of steps until the rare ones have come by, and all rows run the
same groups. A sample of a row's time is one cycle of them all, step after step: the device is not
waited for between steps, as it is not in training. Each row is written as soon as there is anything
to say of it, and again, under the same name, when more is known; the last line counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import hubpath_fast as hp

from . import step_rows, timing
from .children import Write, first_line
from .counting import peak_memory
from .step_counts import device_time
from .step_models import Preset

RECORDED = 4  # routings: enough for a mean, few enough that captures of their sizes take seconds
LEAST_CYCLES = 3  # that quantiles are of
# Of the seconds that are left when all rows are built. On a GPU memory and profiles come after.
TIMED = {"cpu": 0.9, "cuda": 0.5}
SETTLE_CYCLES = 8  # of them, at most, until graphs capture nothing more


@dataclass
class Row:
    """One way to run a step. values: what is known of it, as its line has it."""

    name: str
    function: Callable[[], object]
    model: hp.HubPathway | None = None
    values: dict = field(default_factory=dict)


def measure(
    write: Write,
    preset: Preset,
    px: int,
    names: Sequence[str],
    device: str,
    seconds: float,
    n: int | None = None,
    recorded: int = RECORDED,
) -> None:
    """Times the rows of these names: "single I", "captured single I", "generator", "glue",
    "reference", "dense", an executor, or "graphs, 8 lanes".

    n: samples a batch, None for the preset's; recorded: routings. A row that is wrong, or does not
    run, is a line that says so, and the others go on.
    """
    start = time.monotonic()
    setting = step_rows.make(preset, px, device, n=n, recorded=recorded)
    shape = {"px": px, "N": len(setting.x), "M": len(setting.experts), "K": preset.k}
    rows: list[Row] = []
    for name in names:
        try:
            row = build(setting, name)
            row.values |= shape
            _begin(write, row, setting)
            rows.append(row)
        except Exception as error:
            write(name, ok=False, note=first_line(error), **shape)
    if not rows:
        return
    left = TIMED[device] * (seconds - (time.monotonic() - start))
    cycle = len(setting.noise) * sum(row.values["p50"] for row in rows)
    # Where time does not do for a few cycles, the first measurement stays, which is of one.
    if left >= LEAST_CYCLES * cycle:
        functions = {row.name: row.function for row in rows}
        times = timing.interleaved(
            functions, device, left, min_rounds=LEAST_CYCLES, calls=len(setting.noise)
        )
        for row in rows:
            row.values |= asdict(times[row.name])
    _compare(rows, preset.k)
    for row in rows:
        write(row.name, text=say(row.values), **row.values)
    if device != "cuda":
        return
    for row in rows:
        row.values |= _peak(row, device)
        write(row.name, text=say(row.values), **row.values)
    # Last: the profiler may stay attached, and slow every launch after it.
    for row in rows:
        row.values |= profiled(row.function, device, len(setting.noise))
        write(row.name, text=say(row.values), **row.values)


def build(setting: step_rows.Setting, name: str) -> Row:
    """The row of a name, checked. Raises ValueError for one that is wrong."""
    kind, _, index = name.rpartition(" ")
    if kind == "single":
        return Row(name, step_rows.single_step(setting, int(index)))
    if kind == "captured single":
        return Row(name, step_rows.captured_single_step(setting, int(index)))
    if name in ("generator", "glue"):
        make = {"generator": step_rows.generator_step, "glue": step_rows.glue_step}[name]
        return Row(name, make(setting))
    if name in ("reference", "dense"):
        model = step_rows.reference_hub(setting, name == "dense")
        return Row(name, step_rows.reference_step(setting, model))
    model = step_rows.hub_of(setting, name)
    problem = step_rows.check(setting, model)
    if problem is not None:
        raise ValueError(f"not timed: {problem}")
    row = Row(name, step_rows.hub_step(setting, model), model)
    if name.startswith("graphs"):
        settle(setting, row)
    return row


def settle(setting: step_rows.Setting, row: Row) -> None:
    """Captures, and steps until graphs run all groups; then a comparison with the eager step."""
    start = time.monotonic()
    step_rows.capture_ahead(setting, row.model)
    for _ in range(SETTLE_CYCLES):
        before = row.model.executor_report().misses
        for _ in setting.noise:
            row.function()
        report = row.model.executor_report()
        if report.misses == before:
            break
    timing.synchronize(setting.device)
    row.values |= {
        "settle_seconds": time.monotonic() - start,
        "graphs": sum(map(len, report.captured.values())),
        "graph_memory": report.memory,
        "misses_a_cycle": report.misses - before,
        "eager": {str(i): why for i, why in report.eager.items()},
    }
    if report.hits == 0:
        why = report.eager or "; ".join(report.notes) or "nothing was captured"
        raise ValueError(f"not timed: no graph was replayed: {why}")
    problem = step_rows.replays_differ(setting, row.model)
    if problem is not None:
        raise ValueError(f"not timed: {problem}")


def _begin(write: Write, row: Row, setting: step_rows.Setting) -> None:
    """Warms a row up, and writes a first measurement of it: one cycle."""
    steps = len(setting.noise)
    for _ in range(steps):
        row.function()
    timing.synchronize(setting.device)
    start = time.perf_counter()
    for _ in range(steps):
        row.function()
    timing.synchronize(setting.device)
    seconds = (time.perf_counter() - start) / steps
    row.values |= asdict(timing.Times.of([seconds], steps))
    write(row.name, text=say(row.values), quiet=True, **row.values)


def _compare(rows: Sequence[Row], k: int) -> None:
    """Ratios of each row's median to K times the mean single's, eager and captured."""
    median = {row.name: row.values["p50"] for row in rows}
    for key, kind in (("to_k_single", "single "), ("to_k_captured", "captured single ")):
        singles = [value for name, value in median.items() if name.startswith(kind)]
        if singles:
            for row in rows:
                row.values[key] = row.values["p50"] / (k * statistics.mean(singles))


def _peak(row: Row, device: str) -> dict:
    """peak_memory: of a step, with what captured graphs hold at all times."""
    try:
        return {
            "peak_memory": peak_memory(row.function, device) + row.values.get("graph_memory", 0)
        }
    except Exception as error:
        return {"unmeasured": first_line(error)}


def profiled(function: Callable[[], object], device: str, calls: int) -> dict:
    """What the device does in a call, as values of a line; none off the GPU.

    ``unprofiled`` says why there is nothing: times that were measured are not lost by it.
    """
    if device != "cuda":
        return {}
    try:
        function()  # whatever happens only in a first call
        found = device_time(function, device, calls)
    except Exception as error:
        return {"unprofiled": first_line(error)}
    if found is None:
        return {"unprofiled": "the profiler saw nothing of the device"}
    return {
        "busy": found.busy, "kernel_seconds": found.added, "launches": found.launches,
        "dearest": [list(kernel) for kernel in found.dearest],
    }  # fmt: skip


def say_profile(values: dict, unit: float, digits: int) -> list[str]:
    """What ``profiled`` found, in few words; nothing where it was not asked. unit: of the row's
    times, so many a second."""
    if "unprofiled" in values:
        return [f"not profiled: {values['unprofiled']}"]
    if "busy" not in values:
        return []
    return [f"busy {values['busy'] * unit:.{digits}f}, {values['launches']:.0f} launches"]


def say(values: dict) -> str:
    """A row's values in few words."""
    text = [f"{values['p50'] * 1e3:.2f} ms" + " (one cycle)" * (values["rounds"] == 1)]
    for key, word in (("to_k_single", "K singles"), ("to_k_captured", "K captured")):
        if key in values:
            text.append(f"{values[key]:.2f} x {word}")
    text += say_profile(values, 1e3, 2)
    if "graphs" in values:
        text.append(f"{values['graphs']} graphs, {values['misses_a_cycle']} misses")
    return ", ".join(text)
