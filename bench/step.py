"""A whole training step of a hub, and predictions, against single models and other ways to run it.

    python -m bench.step --preset {tiny,homogeneous,heterogeneous,atari} --device {cpu,cuda}
                         [--px N] [--n N] [--compile] [--quick] [--json FILE]
                         [--growth [--plots DIR]]

Rows of a step (forward, losses, backward, update): each expert alone on the whole batch and their
mean; K times that mean; each alone as a captured graph (CUDA); the generator; the glue (a step
whose experts and generator give tensors that are there already, without an update); the experts
alone on the groups that routing draws; the reference (a loop over experts with masks); dense (all
experts on all samples, masked); sequential; threads (CPU); streams and graphs (CUDA); without
channels_last, and in bfloat16 autocast (CPU); compiled (--compile). Rows of a prediction: batch N,
1 and 64.

Every hub is checked against the reference in float64 before anything is timed; a wrong one is never
timed. All rows share weights, batch and, but where their name says otherwise, precision (bfloat16
autocast on CUDA) and the channels_last layout, and are timed in interleaved rounds (those others
after them, each by itself). --growth times steps over M, K and N instead. The file is written as
soon as there is anything to write.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import hubpath_fast as hp
from hubpath_fast._onednn import enlarge_primitive_cache
from hubpath_fast.executors import Workload
from hubpath_fast.executors.choice import by_rule

from . import records, step_rows, timing
from .counting import peak_memory
from .predictions import checked
from .step_counts import host_reads, launches, work
from .step_models import PRESETS, Preset

WARM_STEPS = 40  # of a hub: most group sizes have been met by then, and their primitives prepared
WARM_SECONDS = 30  # at most, whatever has been met
STEPS_IN_A_ROW = 4
REFERENCES = ("reference", "dense")


def training_rows(setting: step_rows.Setting, compiled: bool):
    """(functions by row, hubs by row, notes by row). A hub that is wrong is a note, no function."""
    functions = {
        f"single {i} ({type(expert).__name__})": step_rows.single_step(setting, i)
        for i, expert in enumerate(setting.experts)
    }
    if setting.device == "cuda":
        for i in range(len(setting.experts)):
            functions[f"captured single {i}"] = step_rows.captured_single_step(setting, i)
    functions["generator"] = step_rows.generator_step(setting)
    functions["glue"] = step_rows.glue_step(setting)
    functions["experts alone"] = step_rows.experts_step(setting, step_rows.hub(setting))
    hubs, notes = {}, {}
    for name in REFERENCES:
        model = step_rows.reference_hub(setting, name == "dense")
        hubs[name], functions[name] = model, step_rows.reference_step(setting, model)
    for name in executors(setting):
        add_hub(setting, name, step_rows.hub(setting, name), functions, hubs, notes)
    for name, variant in step_rows.variants(setting).items():
        add_hub(variant, name, step_rows.hub(variant), functions, hubs, notes)
    if compiled:
        model = step_rows.hub(setting)
        problem = step_rows.check(setting, model, compiled=True)
        model.compile_experts()
        if problem is None:
            hubs["compiled"], functions["compiled"] = model, step_rows.hub_step(setting, model)
        else:
            notes["compiled"] = f"not timed: {problem}"
    return functions, hubs, notes


def executors(setting: step_rows.Setting) -> list[str]:
    return ["sequential", *(["streams", "graphs"] if setting.device == "cuda" else ["threads"])]


def add_hub(setting, name, model, functions, hubs, notes) -> None:
    problem = step_rows.check(setting, model)
    if problem is None:
        hubs[name], functions[name] = model, step_rows.hub_step(setting, model)
    else:
        notes[name] = f"not timed: {problem}"


def measure(
    preset: Preset, px: int, args: argparse.Namespace, save: Callable[[dict], None]
) -> dict:
    """All rows of one size, and the ratios between them. save: given them before predictions."""
    setting = step_rows.make(preset, px, args.device, args.n)
    functions, hubs, notes = training_rows(setting, args.compile)
    n = len(setting.x)
    counted = {
        name: count(functions[name], hubs.get(name), setting.device, n) for name in functions
    }
    # Other layouts and precisions are other primitives. Among the rows, they would drive those of
    # the rest out of the cache: each is warmed and timed by itself.
    apart = {name: functions.pop(name) for name in step_rows.VARIANTS if name in functions}
    # Of the rest one row for all: the primitives are the process's. Graphs capture their own sizes.
    # Experts on one thread each have primitives of their own.
    for name in ("sequential", "threads"):
        warm_up(functions.get(name, functions["reference"]), args.warm)
    if "graphs" in functions:
        step_rows.capture_ahead(setting, hubs["graphs"])
        warm_up(functions["graphs"], args.warm)
        # Counted again: before, its steps were eager.
        counted["graphs"] |= count_replays(functions["graphs"], hubs["graphs"], args.device)
    # On a GPU steps follow one another as in training, where no step waits for the one before.
    calls = STEPS_IN_A_ROW if args.device == "cuda" else 1
    times = timing.interleaved(functions, args.device, args.seconds, args.rounds, calls=calls)
    for name, function in apart.items():
        warm_up(function, args.warm)
        times |= timing.interleaved(
            {name: function}, args.device, args.seconds / 10, args.rounds, calls=calls
        )
    rows = [
        {"row": name, "mode": "train", "N": n, "px": px} | asdict(t) | counted[name]
        | {"samples_per_second": n / t.p50}
        for name, t in times.items()
    ]  # fmt: skip
    rows += [{"row": name, "mode": "train", "px": px, "note": note} for name, note in notes.items()]
    executor = by_rule(Workload(torch.device(args.device), n), setting.experts).executor
    found = {"px": px, "executor": executor, **ratios(times, preset.k, executor), "rows": rows}
    save(found)
    rows += prediction_rows(setting, px, args)
    return found


def warm_up(function: Callable, steps: int, seconds: float = WARM_SECONDS) -> None:
    start = time.perf_counter()
    for _ in range(steps):
        function()
        if time.perf_counter() - start > seconds:
            return


def count_replays(function: Callable, model: hp.HubPathway, device: str) -> dict:
    """Launches and peak memory of a hub with captured graphs: what these hold is allocated before
    a step, and counts."""
    peak, held = peak_memory(function, device), model.executor_report().memory
    return {
        "launches": launches(function, device),
        "peak_memory": None if peak is None else peak + held,
    }


def count(function: Callable, model, device: str, n: int) -> dict:
    function()
    found = {
        "host_reads": host_reads(function),
        "launches": launches(function, device),
        "peak_memory": peak_memory(function, device),
    }
    if model is not None:
        forwards, gflops = work(model.experts, function, n)
        found |= {"expert_forwards": forwards, "gflops_per_sample": gflops}
    return found


def ratios(times: dict[str, timing.Times], k: int, executor: str) -> dict[str, float]:
    """What the goals are about. Medians; ``..._best``: of the fastest rounds instead.

    executor: whose row is the step, the one that ``auto`` chooses.
    """
    found = {}
    for suffix, which in (("", "p50"), ("_best", "best")):
        t = {name: getattr(value, which) for name, value in times.items()}
        mean = statistics.mean(value for name, value in t.items() if name.startswith("single "))
        if executor not in t or "sequential" not in t:
            continue
        step = t[executor]
        found |= {
            f"single_mean_seconds{suffix}": mean,
            f"k_single_seconds{suffix}": k * mean,
            f"ratio_to_k_single{suffix}": step / (k * mean),
            f"ratio_to_dense{suffix}": t["dense"] / step,
            f"ratio_to_reference{suffix}": t["reference"] / step,
            f"glue_share{suffix}": t["glue"] / step,
            f"generator_share{suffix}": t["generator"] / step,
            f"experts_to_k_single{suffix}": t["experts alone"] / (k * mean),
        }
        for name in ("sequential", "threads", "streams", "graphs", "compiled"):
            if name in t:
                found[f"{name}_to_k_single{suffix}"] = t[name] / (k * mean)
                found[f"dense_to_{name}{suffix}"] = t["dense"] / t[name]
                found[f"reference_to_{name}{suffix}"] = t["reference"] / t[name]
        captured = [value for name, value in t.items() if name.startswith("captured single ")]
        if captured and "graphs" in t:
            ratio = t["graphs"] / (k * statistics.mean(captured))
            found[f"graphs_to_k_captured_single{suffix}"] = ratio
        for name in step_rows.VARIANTS:
            if name in t:
                found[f"{name.split()[1]}_to_sequential{suffix}"] = t[name] / t["sequential"]
    return found


def prediction_rows(setting: step_rows.Setting, px: int, args: argparse.Namespace) -> list[dict]:
    variants = step_rows.variants(setting)
    hubs = {name: (setting, step_rows.hub(setting, name)) for name in executors(setting)}
    hubs |= {name: (variant, step_rows.hub(variant)) for name, variant in variants.items()}
    plain = {name: step_rows.reference_hub(setting, name == "dense") for name in REFERENCES}
    rows = []
    for n in dict.fromkeys((len(setting.x), 1, 64)):
        functions = {
            f"single {i}": step_rows.predict(setting, expert, n)
            for i, expert in enumerate(setting.experts)
        }
        functions |= {name: step_rows.predict(setting, m, n) for name, m in plain.items()}
        expected, shared = functions["reference"](), {"mode": "predict", "N": n, "px": px}
        ours, notes = checked(hubs, expected, n)
        functions |= ours
        rows += [{"row": name, "note": note} | shared for name, note in notes.items()]
        times = timing.interleaved(functions, args.device, args.seconds / 4, args.rounds)
        rows += [
            {"row": name} | shared | asdict(t) | {"samples_per_second": n / t.p50}
            for name, t in times.items()
        ]
    return rows


def table(found: dict) -> str:
    lines = [f"{found['px']} px", f"{'row':30} {'mode':8} {'N':>5} {'p20':>9} {'p50':>9} {'p80':>9}"
             f" ms {'samples/s':>10} {'MiB':>7} {'reads':>5} {'launches':>8} {'experts':>7}"
             f" {'GFLOP':>7}"]  # fmt: skip
    for row in found["rows"]:
        if "note" in row:
            lines.append(f"{row['row']:30} {row['mode']:8} {row['note']}")
            continue
        memory = row.get("peak_memory")
        cells = [
            f"{row['row']:30} {row['mode']:8} {row['N']:5}",
            *(f"{row[p] * 1e3:9.2f}" for p in ("p20", "p50", "p80")),
            f"   {row['samples_per_second']:10.1f}",
            f"{memory / 2**20:7.0f}" if memory is not None else f"{'-':>7}",
            *(f"{_cell(row.get(key)):>{width}}" for key, width in (
                ("host_reads", 5), ("launches", 8), ("expert_forwards", 7),
                ("gflops_per_sample", 7),
            )),
        ]  # fmt: skip
        lines.append(" ".join(cells))
    lines += [f"{'executor of the step':28} {found['executor']}"]
    lines += [f"{name:28} {value:8.4f}" for name, value in found.items() if name not in
              ("px", "rows", "executor")]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(value) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.step", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--px", type=int, help="one of the preset's sizes (default: all)")
    parser.add_argument("--n", type=int, help="samples a batch (default: the preset's)")
    parser.add_argument("--compile", action="store_true", help="a row of compiled experts")
    parser.add_argument("--growth", action="store_true", help="time steps over M, K and N instead")
    parser.add_argument("--plots", type=Path, help="with --growth: a folder for the plots")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs")
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds, a size")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args(argv)
    sizes = PRESETS[args.preset].sizes
    if args.px is not None and args.px not in sizes:
        parser.error(f"--px: {args.preset} has the sizes {', '.join(map(str, sizes))}")
    if args.n is not None and args.n < 3:
        parser.error(f"--n: a third of a batch is checked, so it needs 3 samples, not {args.n}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False; use --device cpu")
    args.warm, args.rounds = WARM_STEPS, 10
    if args.quick:
        args.seconds, args.warm, args.rounds = 0.0, 1, 3
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    enlarge_primitive_cache()  # single models are timed before a hub is made
    timing.refuse_interpreter()
    preset = PRESETS[args.preset]
    common = {
        "benchmark": "step", "preset": args.preset, "quick": args.quick,
        **records.environment(args.device),
    }  # fmt: skip
    print(" ".join(f"{key}={value}" for key, value in common.items()))
    if args.growth:
        from .step_growth import run_growth

        found = {**common, **run_growth(args)}
        write(args.json, found)
        return 0
    sizes = preset.sizes if args.px is None else (args.px,)
    measured: list[dict] = []

    def save(latest: dict) -> dict:
        # The ratios of the first size stand at the top as well.
        all_sizes = {str(m["px"]): m for m in (*measured, latest)}
        top = next(iter(all_sizes.values()))
        found = {**common, **{k: v for k, v in top.items() if k != "rows"}, "sizes": all_sizes}
        write(args.json, found)
        return found

    for px in sizes:
        latest = measure(preset, px, args, save)
        found = save(latest)
        measured.append(latest)
        print("\n" + table(latest), flush=True)
    return 0 if "ratio_to_k_single" in found else 1


def write(path: Path | None, found: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
