"""Single training steps of captured graphs, each waited for, on routings that change all the time.

Unlike the rows of ``speed_step``, which go through a few recorded routings, no two steps here have
the same groups: a group that no graph can take runs eagerly, and a capture stalls its step. That
happens to training, and shows in its slow steps. Graphs are captured ahead, by ``model.warm_up``
on one batch; then one hub goes through all streams.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

import hubpath_fast as hp

from . import routing_traces, step_rows, timing
from .children import Write, first_line
from .step_models import Preset

STREAMS = ("balanced", "drifting")  # kinds of ``routing_traces``; the second begins as the first
FIRST = 5  # steps before the first that counts: of the optimizer and the libraries


def measure(write: Write, preset: Preset, px: int, device: str, seconds: float, steps: int) -> None:
    """A line for each stream: quantiles of so many steps, fewer where the seconds do not do for
    them, and what the executor did meanwhile."""
    start = time.monotonic()
    setting = step_rows.make(preset, px, device, recorded=1)
    model = step_rows.hub(setting, "graphs")
    problem = step_rows.check(setting, model)
    step_rows.capture_ahead(setting, model)
    problem = problem or step_rows.replays_differ(setting, model)
    if problem is not None:
        raise ValueError(f"not timed: {problem}")
    shared = {
        "px": px, "N": len(setting.x), "M": len(setting.experts), "K": preset.k,
        "captures_ahead": captures(model), "warm_up_seconds": time.monotonic() - start,
    }  # fmt: skip
    for index, kind in enumerate(STREAMS):
        left = seconds - (time.monotonic() - start)
        try:
            values = stream(setting, model, kind, steps, left / (len(STREAMS) - index))
            write(kind, text=say(values), **values, **shared)
        except Exception as error:
            write(kind, ok=False, note=first_line(error), **shared)


def stream(
    setting: step_rows.Setting, model: hp.HubPathway, kind: str, steps: int, seconds: float
) -> dict:
    """The values of a line."""
    noise = noises(setting, kind, FIRST + steps)
    step = step_rows.hub_step(dataclasses.replace(setting, noise=noise), model)
    start = time.monotonic()
    for _ in range(FIRST):
        step()
    before, captured = model.executor_report(), captures(model)
    samples: list[float] = []
    while len(samples) < steps and (len(samples) < 2 or time.monotonic() - start < seconds):
        samples.append(_seconds(step, setting.device))
    after = model.executor_report()
    replayed = after.replayed_rows - before.replayed_rows
    return asdict(timing.Times.of(samples)) | {
        "p95": statistics.quantiles(samples, n=20, method="inclusive")[-1],
        "slowest": max(samples),
        "hits": after.hits - before.hits,
        "misses": after.misses - before.misses,
        "captures": captures(model) - captured,
        "padding": (after.padded_rows - before.padded_rows) / replayed if replayed else 0.0,
        "eager": {str(i): why for i, why in after.eager.items()},
    }


def noises(setting: step_rows.Setting, kind: str, steps: int) -> tuple[Tensor, ...]:
    """Of steps, [N, M] each: at equal scores it alone routes."""
    size = len(setting.x), len(setting.experts)
    keys = routing_traces.keys(kind, 0, steps, *size)
    return tuple(torch.from_numpy(each).float().to(setting.device) for each in keys)


def captures(model: hp.HubPathway) -> int:
    """How many graphs the experts have for training steps."""
    return sum(map(len, model.executor_report().captured.values()))


def _seconds(step: Callable[[], object], device: str) -> float:
    timing.synchronize(device)
    start = time.perf_counter()
    step()
    timing.synchronize(device)
    return time.perf_counter() - start


def say(values: dict) -> str:
    """A stream's values in few words."""
    return (
        f"{values['rounds']} steps: median {values['p50'] * 1e3:.2f} ms, p95 "
        f"{values['p95'] / values['p50']:.2f}x, slowest {values['slowest'] * 1e3:.1f} ms; "
        f"{values['misses']} groups eager, {values['captures']} captures,"
        f" {values['padding']:.1%} padding"
    )
