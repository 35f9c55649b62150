"""Training steps of a hub of hundreds of heads on a shelf's features, which lie on the device.

The heads in one launch, with the optimizer's updates of each or the executor's of all, beside the
same hub with one expert after another: there each head is a gather and a product, forward and
backward, and the host pays for each.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict

import torch

import hubpath_fast as hp
from hubpath_fast.executors.sequential import SequentialExecutor
from hubpath_fast.shelf.executor import GroupedHeads
from hubpath_fast.shelf.placing import place

from . import timing
from .check_shelf import RATE, Shelf, batch, hub_of
from .children import Write, first_line
from .speed_step import profiled, say_profile

RECORDED = 8  # batches, in turn
# Row -> (what runs the experts, whether it may make the updates).
ROWS: dict[str, tuple[Callable[[], object], bool]] = {
    "one launch, its updates": (GroupedHeads, True),
    "one launch, AdamW's updates": (GroupedHeads, False),
    "sequential": (SequentialExecutor, False),
}


def measure(write: Write, shelf: Shelf, device: str, seconds: float) -> None:
    """A line for each row: seconds of a step, the device not waited for between steps."""
    plain, shape = hub_of(shelf), shelf._asdict()
    shape["models"] = list(shelf.models)
    with contextlib.ExitStack() as stack:
        functions = {}
        for name, (executor, own) in ROWS.items():
            try:
                model = copy.deepcopy(plain)
                model.executor = executor()
                functions[name] = stepping(model.train(), shelf, device, own, stack)
                functions[name]()
            except Exception as error:
                functions.pop(name, None)
                write(name, ok=False, note=first_line(error), **shape)
        if not functions:
            return
        times = timing.interleaved(functions, device, seconds / 2, min_rounds=3, calls=RECORDED)
        values = {name: asdict(found) | shape for name, found in times.items()}
        for name, row in values.items():
            write(name, text=say(row), **row)
        # Last: the profiler may stay attached, and slow every launch after it.
        for name, function in functions.items():
            if more := profiled(function, device, calls=2):
                write(name, text=say(values[name] | more), **values[name] | more)


def stepping(
    model: hp.HubPathway, shelf: Shelf, device: str, own: bool, stack: contextlib.ExitStack
) -> Callable[[], None]:
    """A training step on recorded batches in turn. stack: ends what the executor began."""
    if torch.device(device).type == "cuda":
        place(model, device)
    model.to(device)
    heads = [(expert.layer.weight, expert.layer.bias) for expert in model.experts]
    groups = [list(group) for group in zip(*heads, strict=True)]
    router = list(model.generator.parameters())
    groups = [{"params": parameters} for parameters in (*groups, router)]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    if own:
        stack.enter_context(model.executor.updating(model.experts, optimizer))
    loss = hp.HubPathwayLoss()
    recorded = [[part.to(device) for part in batch(shelf, i)] for i in range(RECORDED)]
    batches = itertools.cycle((x, y, noise.float()) for x, y, noise in recorded)

    def step() -> None:
        x, y, noise = next(batches)
        optimizer.zero_grad()
        loss(model(x, noise), y).total.backward()
        optimizer.step()

    return step


def say(values: dict) -> str:
    """A row's values in few words."""
    return ", ".join([f"{values['p50'] * 1e3:.2f} ms", *say_profile(values, 1e3, 2)])
