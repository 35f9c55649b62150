"""Checks of what a trained hub is asked for: policies, newcomers, dropped experts, frozen models.

Each is a small hub on the device, asked in turn for batches of some sizes, so that captured graphs
replay, beside the same hub in float64 on the host, where torch alone computes. As in
``check_executors``, each check is a function of a device and of how hubs are made.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.model import add_newcomer

from .check_executors import PX, MakeHub, batch_norm, batches, make_hub
from .children import Write
from .operations import relative_error
from .verdicts import write_error

M, K = 4, 3
BATCHES = (24, 5) * 4  # two batches in turn: a group of some size is captured at its third sight
ONE_BY_ONE = (1,) * 8
# As ``check_executors``: a few roundings of float32, or of bfloat16 in three layers. A row that is
# lost or doubled, or a weight of another sample, is off by a tenth and more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def hub_of(make: MakeHub, executor: str, device: str) -> hp.HubPathway:
    """A hub whose scores differ by sample, of the same weights each time."""
    torch.manual_seed(0)
    model = make([batch_norm() for _ in range(M)], executor, k=K)
    with torch.no_grad():
        for expert in model.experts:  # running statistics that change something
            for norm in expert.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.running_mean.uniform_(-0.1, 0.1)
                    norm.running_var.uniform_(0.5, 1.5)
        nn.init.normal_(model.generator.clean.weight, std=4.0)
    return model.eval().to(device).to(memory_format=torch.channels_last)


def top_mass(model: hp.HubPathway) -> None:
    model.policy = hp.RoutingPolicy(top_mass=0.6)


def penalty(model: hp.HubPathway) -> None:
    model.policy = hp.RoutingPolicy(penalty=[0.0, 0.2, 0.4, 0.6], k=1)


@torch.no_grad()
def newcomer(model: hp.HubPathway) -> None:
    """One that gets some of the samples."""
    torch.manual_seed(1)
    add_newcomer(model, batch_norm().eval())
    score = model.generator.clean[-1]
    nn.init.normal_(score.weight, std=4.0)
    score.bias.zero_()


def removed(model: hp.HubPathway) -> None:
    model.remove_expert(1)


CHANGES: dict[str, Callable[[hp.HubPathway], None]] = {
    "as it is": lambda model: None,
    "dropped slots": top_mass,
    "penalty": penalty,
    "newcomer": newcomer,
    "removed expert": removed,
}


def changed(write: Write, executors: Sequence[str], device: str, make: MakeHub = make_hub) -> None:
    """Predictions of changed hubs: who is asked, and what they say."""
    for name in executors:
        for title, change in CHANGES.items():
            model = hub_of(make, name, "cpu")
            change(model)
            wide = truth_of(model)
            model = model.to(device)
            write_error(
                write, f"{name} {title}", lambda m=model, w=wide: _wrong(m, w, device, BATCHES)
            )


def truth_of(model: hp.HubPathway) -> hp.HubPathway:
    """The same in float64 on the host, one expert after another."""
    wide = copy.deepcopy(model).double().eval()
    wide.executor = "sequential"
    return wide


def frozen(write: Write, device: str, make: MakeHub = make_hub, executor: str = "graphs") -> None:
    """Models that were frozen, asked about one image at a time, then about several."""
    for dtype in TOLERANCE:
        model = hub_of(make, executor, device)
        wide = truth_of(model.cpu())
        model.to(device)

        def wrong(model=model, wide=wide, dtype=dtype) -> tuple[str | None, float]:
            example = batches(device, 1)[0][0]
            given = None if dtype == torch.float32 else dtype
            model.freeze_for_inference(dtype=given, example=example)
            folded = sum(part.folded for part in model.frozen.parts.values())
            if folded < 2 * M:
                return f"{folded} BatchNorms are folded, of {2 * M} of the experts", math.nan
            if executor == "graphs" and not model.frozen.captured:
                return "predictions of one image are not captured", math.nan
            before = model.executor_report().misses
            found = _wrong(model, wide, device, ONE_BY_ONE, TOLERANCE[dtype])
            if executor == "graphs" and model.executor_report().misses > before:
                return "one image is not predicted by graphs alone", found[1]
            return _wrong(model, wide, device, BATCHES, TOLERANCE[dtype]) if not found[0] else found

        write_error(write, f"{executor} frozen {str(dtype)[6:]}", wrong)


def _wrong(
    model: hp.HubPathway, wide: hp.HubPathway, device: str, sizes: Sequence[int],
    tolerance: float = TOLERANCE[torch.float32],
) -> tuple[str | None, float]:  # fmt: skip
    worst, asked, last = 0.0, set(), torch.channels_last
    for index, size in enumerate(sizes):
        random = torch.Generator().manual_seed(index % 2)
        x = torch.rand(size, 3, PX, PX, generator=random).contiguous(memory_format=last)
        with torch.inference_mode():
            expected, found = wide(x.double()), model(x.to(device))
            counts = [
                m.route(given).counts() for m, given in ((wide, x.double()), (model, x.to(device)))
            ]
        if counts[0] != counts[1]:
            return f"batch {index}: experts get {counts[1]} rows, not {counts[0]}", worst
        asked |= {i for i, count in enumerate(counts[0]) if count}
        error = relative_error(found.float().cpu(), expected)
        if not error <= tolerance:
            return f"batch {index}: predictions are off by {error:.1e}", error
        worst = max(worst, error)
    if len(asked) < 2:
        return f"only experts {sorted(asked)} were asked: nothing was checked", worst
    name = model.executor_report().executor
    if name == "graphs" and model.executor_report().hits == 0:
        return "no graph was replayed", worst
    return None, worst
