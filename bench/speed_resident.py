"""Predictions of a hub that is larger than its room on the device, beside all of it there.

The paper's experts, more of them than its hub has, are asked two at a time in batches whose experts
are found in the room as often as a row says: most are of a few hot experts, the others of all. Rows
take the same batches in turn, each waited for: how long who asks has to wait. A hit costs what the
whole hub costs; a miss is a copy of an expert's weights, of which what runs meanwhile hides a part.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import ResidentExecutor
from hubpath_fast.model import FixedRoutes

from . import timing
from .children import Write, first_line
from .operations import relative_error

EXPERTS, ROOM, K = 12, 4, 2
HIT_RATES = (1.0, 0.9, 0.5)
WHOLE = "all on the device"
TOLERANCE = 2e-2  # of bfloat16, as of ``predictions``
LEAST = 4  # batches of a row


def measure(
    write: Write,
    make: Callable[[], list[nn.Module]],
    px: int,
    n: int,
    device: str,
    seconds: float,
    rates: Sequence[float] = HIT_RATES,
) -> None:
    """A line for the whole hub, and one for each rate of hits. make: the experts."""
    torch.manual_seed(0)
    experts = list(nn.ModuleList(make()).to(memory_format=torch.channels_last))
    routes = FixedRoutes(range(K), [1.0] * K, len(experts))
    num_outputs = experts[0](torch.zeros(2, 3, px, px)).shape[1]
    whole, room = (
        hp.HubPathway(parts, copy.deepcopy(routes), k=K, num_outputs=num_outputs, executor=executor)
        for parts, executor in (
            (copy.deepcopy(experts), "sequential"), (experts, ResidentExecutor(ROOM)),
        )
    )  # fmt: skip
    models = {"whole": whole.to(device).eval(), "room": room.to(device).eval()}
    x = torch.rand(n, 3, px, px).to(device, memory_format=torch.channels_last)
    shape = {"px": px, "N": n, "M": len(experts), "K": K, "room": ROOM}

    def predict(name: str, asked: Sequence[int]) -> torch.Tensor:
        models[name].generator = FixedRoutes(asked, [1.0] * K, len(experts))
        half = torch.device(device).type == "cuda"
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            return models[name](x)

    for first in range(0, len(experts), K):  # every expert once: kernels, and what cuDNN chooses
        pair = range(first, first + K)
        error = relative_error(predict("room", pair), predict("whole", pair).double())
        if not error <= TOLERANCE:
            raise ValueError(f"not timed: experts {list(pair)}: relative error {error:.1e}")
    # Each rate's batches by both, half of the seconds each at most.
    each, times = seconds / (len(rates) + 1), {}
    for rate in rates:
        name = f"room for {ROOM}, {rate:.0%} hits"
        try:
            values, seen = _rate(predict, models["room"], rate, len(experts), device, each)
        except Exception as error:
            write(name, ok=False, note=first_line(error), **shape)
            continue
        times.setdefault(WHOLE, []).extend(seen)
        values |= shape | {"images_per_second": n / values["mean"]}
        values["of_whole"] = statistics.fmean(seen) / values["mean"]
        write(name, text=say(values), **values)
    if WHOLE in times:
        values = _values(times[WHOLE]) | shape
        values["images_per_second"] = n / values["mean"]
        write(WHOLE, text=say(values), **values)


def _rate(
    predict: Callable, room: hp.HubPathway, rate: float, experts: int, device: str, seconds: float
) -> tuple[dict, list[float]]:
    """The values of a rate's line, and the seconds of the whole hub's batches beside it."""
    samples: dict[str, list[float]] = {"room": [], "whole": []}
    batches = asked(rate, experts)
    for _ in range(ROOM):  # the hot experts come in
        predict("room", next(batches))
    before, start = room.executor_report(), time.monotonic()
    while len(samples["room"]) < LEAST or time.monotonic() - start < seconds:
        pair = next(batches)
        for name, found in samples.items():
            timing.synchronize(device)
            begin = time.perf_counter()
            predict(name, pair)
            timing.synchronize(device)
            found.append(time.perf_counter() - begin)
    after = room.executor_report()
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return _values(samples["room"]) | {
        "hit_rate": hits / (hits + misses),
        "bytes_in": after.bytes_in - before.bytes_in,
        "seconds_copying": after.seconds_copying - before.seconds_copying,
        "seconds_waited": after.seconds_waited - before.seconds_waited,
    }, samples["whole"]


def asked(rate: float, experts: int) -> Iterator[tuple[int, ...]]:
    """The K experts of each batch in turn, the same in every run; of all so many find theirs there.

    K hot ones stay in the room, since one that is not asked now is asked the next time; the others
    come through the rest of it, and have left before they are asked again.
    """
    draw, cold, partner = random.Random(0), K, 0
    while True:
        if draw.random() >= K * (1 - rate):
            yield tuple(range(K))
            continue
        yield cold, partner  # one of the batch's K is a miss
        cold, partner = max(K, (cold + 1) % experts), (partner + 1) % K


def _values(samples: list[float]) -> dict:
    return asdict(timing.Times.of(samples)) | {"mean": statistics.fmean(samples)}


def say(values: dict) -> str:
    """A row's values in few words."""
    text = [f"{values['p50'] * 1e3:.2f} ms", f"{values['images_per_second']:.0f} images/s"]
    if "of_whole" in values:
        text.append(f"{values['of_whole']:.2f} of the whole hub's")
        text.append(f"{values['hit_rate']:.1%} found")
    if values.get("seconds_copying"):
        rate = values["bytes_in"] / values["seconds_copying"]
        text.append(f"{rate / 1e9:.1f} GB/s in")
    return ", ".join(text)
