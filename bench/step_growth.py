"""How the cost of a step grows with M (experts), K (active ones) and N (samples); a plot of each.

One small convolution expert, copied M times, and balanced routing by given scores. Beside the whole
step stands what its experts cost alone at the same group sizes: more experts with the same number
of rows are smaller groups, and what those cost is no fault of the hub. The gap is the hub's, and
``growth_beyond_smaller_groups`` is its growth: how many times the step takes longer at M = 64 than
at M = 4, over how many times the experts alone do. N = 64 and K = 2 give every expert the same
number of rows at each M, two at M = 64, so that none falls below ``min_group``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import hubpath_fast as hp
from hubpath_fast import reference
from hubpath_fast.devices import full_float32
from hubpath_fast.executors.groups import running_statistics

from . import timing
from .operations import relative_error
from .step_models import balanced_scores, timm_experts
from .step_rows import FORWARD_TOLERANCE

PX, OUTPUTS = 32, 10
STEPS_IN_A_ROW = 2  # on a GPU, where a step that is waited for takes longer; at M = 64, seconds
SETTLE = 8  # steps at most: a size is captured at its third sight
AXES = {
    "M": [(64, m, 2) for m in (2, 4, 8, 16, 32, 64)],
    "K": [(48, 8, k) for k in range(1, 9)],
    "N": [(n, 5, 2) for n in (8, 16, 32, 64, 128, 256, 512, 1024)],
}
WORDS = {
    "M": "experts in the hub, M (N = 64, K = 2)",
    "K": "active experts per sample, K (N = 48, M = 8)",
    "N": "samples a batch, N (M = 5, K = 2)",
}


def step_functions(n: int, m: int, k: int, device: str, executor: str = "auto"):
    """(the whole step without an update, its experts alone and eager).

    Raises ValueError where the step then is not the reference's.
    """
    torch.manual_seed(0)
    experts = timm_experts(["test_resnet"] * m, OUTPUTS)
    scores = balanced_scores(n, m, k)
    model = hp.HubPathway(experts, scores, k=k, num_outputs=OUTPUTS, executor=executor)
    model = model.to(device, memory_format=torch.channels_last)
    criterion = hp.HubPathwayLoss()
    x = torch.rand(n, 3, PX, PX, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(OUTPUTS, (n,), device=device)
    counts = model.route(x).counts()
    if max(counts) - min(counts) > 1:
        raise RuntimeError(f"routing of N={n}, M={m}, K={k} is not balanced: {counts}")

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        out = model(x, target=y)
        criterion(out, y).total.backward()
        return out.prediction.detach()

    def alone() -> None:
        model.zero_grad(set_to_none=True)
        outputs = []
        for expert, count in zip(model.experts, counts, strict=True):
            if count:
                with running_statistics(expert, count < model.min_group):
                    outputs.append(expert(x[:count]).sum())
        sum(outputs).backward()

    settle(model, step)
    plain = reference.ReferenceHubPathway(model.experts, model.generator, model.aggregator, k)
    error = relative_error(step(), plain.train()(x).prediction.detach())
    if not error <= FORWARD_TOLERANCE:
        raise ValueError(f"not timed: relative error {error:.1e} above {FORWARD_TOLERANCE:.0e}")
    return step, alone


def settle(model: hp.HubPathway, step: Callable[[], object]) -> None:
    """Steps until captured graphs, if it runs any, capture nothing more."""
    for _ in range(SETTLE):
        before = model.executor_report().misses
        step()
        if model.executor_report().misses == before:
            return


def times_of(
    n: int, m: int, k: int, device: str, seconds: float, rounds: int, executor: str = "auto"
) -> dict[str, timing.Times]:
    """Of the step and of its experts alone. Raises as ``step_functions`` does."""
    with full_float32():  # as captured, too: TF32 would hide from the check what is wrong
        step, alone = step_functions(n, m, k, device, executor)
        functions = {"step": step, "experts alone": alone}
        calls = STEPS_IN_A_ROW if device == "cuda" else None
        return timing.interleaved(functions, device, seconds, rounds, calls=calls)


def beyond_smaller_groups(small: dict, large: dict) -> dict:
    """How many times longer than at M=4 a row takes at M=64: the step, its experts, the ratio."""
    grown = {name: large[name]["p50"] / small[name]["p50"] for name in ("step", "experts alone")}
    beyond = grown["step"] / grown["experts alone"]
    return {"growth_4_to_64": grown, "growth_beyond_smaller_groups": beyond}


def run_growth(args: argparse.Namespace) -> dict:
    """The rows by axis, under "growth", and what the goal is about, from M=4 to M=64."""
    rows = {}
    for axis, points in AXES.items():
        chosen = [points[0], *points[1:-1] * (not args.quick), points[-1]]
        rows[axis] = [measure_point(n, m, k, args) for n, m, k in dict.fromkeys(chosen)]
    found: dict = {"growth": rows}
    by_m = {row["M"]: row for row in rows["M"]}
    if {4, 64} <= by_m.keys():
        found |= beyond_smaller_groups(by_m[4], by_m[64])
        grown, beyond = found["growth_4_to_64"], found["growth_beyond_smaller_groups"]
        print(
            f"from M=4 to M=64: step x{grown['step']:.2f}, experts alone "
            f"x{grown['experts alone']:.2f}; growth_beyond_smaller_groups {beyond:.3f}"
        )
    if args.plots is not None:
        draw(rows, args.plots, f"step-growth-{args.device}")
    return found


def measure_point(n: int, m: int, k: int, args: argparse.Namespace) -> dict:
    times = times_of(n, m, k, args.device, args.seconds / 10, args.rounds)
    print(
        f"N={n:5} M={m:3} K={k:2}  step {times['step'].p50 * 1e3:9.2f} ms, experts alone "
        f"{times['experts alone'].p50 * 1e3:9.2f} ms",
        flush=True,
    )
    return {"N": n, "M": m, "K": k} | {name: asdict(t) for name, t in times.items()}


def draw(rows: dict[str, list[dict]], folder: Path, name: str) -> list[Path]:
    """A plot of each axis, as ``folder/NAME-AXIS.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for axis in rows:
        written.append(folder / f"{name}-{axis}.png")
        plot(axis, rows[axis], written[-1])
    return written


def plot(axis: str, rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [row[axis] for row in rows]
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for name, style in (("step", "o-"), ("experts alone", "s--")):
        middle = [row[name]["p50"] * 1e3 for row in rows]
        low, high = ([row[name][p] * 1e3 for row in rows] for p in ("p20", "p80"))
        [line] = axes.plot(sizes, middle, style, label=name)
        axes.fill_between(sizes, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    if axis == "N":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(WORDS[axis])
    axes.set_ylabel("milliseconds a step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
