"""``hubpath hub plan``: which rank would have which expert of a hub, and what a step then takes.

Memory is that of float32 training with AdamW of all that a network has: weights, gradients, two
moments, and the activations of the rows that an expert gets. Rows are those of a mean step. All is
counted from shapes, without a network or weights; only ``measure`` runs the experts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .._checks import check_k
from ..baselines.costs import wait
from ..devices import check_device
from ..hub.build import check_names, default_input_size, working_size
from ..hub.costs import BYTES_PER_ADAMW_PARAMETER, TASK, Costs, costs, saved_bytes
from ..hub.errors import HubError
from ..hub.labels import expert_names
from ..hub.router import default_router
from ..hub.source import HubModel, with_head
from ..hub.spec import read_specs, split_names
from ..parallel.placement import Plan, plan
from ..parallel.ranks import layout
from ..parallel.share import check_batch_size
from ..parallel.traffic import dp_bytes, ep_bytes, on_the_wire
from ..runs.folder import RunFolder

WARM_UPS, REPEATS = 2, 5

Tell = Callable[[str], None]


@dataclass(frozen=True)
class HubPlan:
    """A hub on ranks; what differs between ranks is given for each of the ``ep`` of a replica.

    names: [M] of the experts. costs: [M] of each, for ``size`` pixels a side. rows: [M] that each
    gets in a step, of a replica's samples. placed: who has which expert, the work of each rank
    (``Costs.work``, or with ``measured`` milliseconds of forward and backward) and the
    bytes of its experts. router_bytes: that each rank needs beside its experts. terms: bytes that a
    mean rank hands over in a step, by what for; sent: those that it sends, sums made in rings.
    """

    names: tuple[str, ...]
    costs: tuple[Costs, ...]
    rows: tuple[float, ...]
    size: int
    dp: int
    ep: int
    placed: Plan
    measured: bool
    router_bytes: int
    terms: dict[str, int]
    sent: int

    @property
    def bytes_of_ranks(self) -> tuple[int, ...]:
        return tuple(size + self.router_bytes for size in self.placed.sizes)

    def experts_of(self, rank: int) -> list[int]:
        return [i for i, owner in enumerate(self.placed.owners) if owner == rank]


def plan_hub(
    names: str | Sequence[str],
    ranks: int,
    memory: int | None = None,
    batch_size: int = 48,
    k: int = 2,
    size: int | None = None,
    parallel: str | None = None,
    run: str | Path | None = None,
    measure: str | None = None,
    tell: Tell = lambda text: None,
) -> HubPlan:
    """Places a hub on ranks, the longest first.

    Args:
        names: of the experts and hubs, in one text with commas between or a list.
        ranks: processes, each with a device of its own.
        memory: bytes of a device; None: no bound.
        batch_size: samples of a step, over all ranks.
        k: K, active experts of a sample.
        size: pixels a side of the images; None: what suits the hub.
        parallel: "ep", "dp" or "DPxEP"; see ``parallel.start``.
        run: the folder of a run of such a hub, whose log says how many rows each expert gets; None:
            all as many.
        measure: a device, on which each expert's forward and backward pass is timed.
        tell: is told what is being measured.

    Raises:
        ValueError: numbers that do not fit each other, more ranks than experts, too little memory,
            a log of another hub; HubError: all that is wrong with the names.
    """
    specs = read_specs(split_names(names) if isinstance(names, str) else names)
    models = check_names(specs)
    count, labels = len(specs), expert_names(specs)
    if ranks < 1:
        raise ValueError(f"ranks: expected an integer of at least 1, got {ranks}")
    check_k(k, count)
    check_batch_size(batch_size, ranks)
    dp, ep = layout(parallel, ranks, count)
    size = size or default_input_size(specs)
    found, problems = [], []
    for spec, model in zip(specs, models, strict=True):
        try:
            found.append(costs(model, working_size(spec, model, TASK, size)))
        except HubError as error:
            problems += error.problems
    if problems:
        raise HubError(*problems)
    load = [1 / count] * count if run is None else load_of(run, count)
    rows = [batch_size / dp * k * share for share in load]
    router = default_router(TASK.num_outputs, size, k, [c.flops for c in found])
    parameters = sum(p.numel() for module in router for p in module.parameters())
    seen = saved_bytes(router[0], size) * batch_size // ranks
    router_bytes = parameters * BYTES_PER_ADAMW_PARAMETER + seen
    sizes = [c.training_bytes(r) for c, r in zip(found, map(_whole, rows), strict=True)]
    work = [c.work * r for c, r in zip(found, rows, strict=True)]
    if measure is not None:
        work = _milliseconds(models, found, rows, check_device(measure), tell)
    placed = _place(work, sizes, ep, memory, router_bytes)
    terms = _terms(found, rows, placed.owners, parameters, size, dp, ep)
    sent = round(_sent(terms, dp, ep))
    return HubPlan(
        tuple(labels), tuple(found), tuple(rows), size, dp, ep, placed, measure is not None,
        router_bytes, terms, sent,
    )  # fmt: skip


def load_of(run: str | Path, count: int) -> list[float]:
    """Each expert's share of all rows that the log of a run counts; ValueError where it has none,
    or of another number of experts."""
    lines = [line["rows"] for line in RunFolder(Path(run)).history() if line.get("rows")]
    if not lines:
        raise ValueError(
            f"run: {run} has no log that counts the rows of each expert; give the folder of a run "
            "of `hubpath fit`, or leave it out"
        )
    if len(lines[0]) != count:
        raise ValueError(
            f"run: expected rows of {count} experts as in the hub, got {len(lines[0])} in the log "
            f"of {run}; name the hub of that run"
        )
    sums = [sum(column) for column in zip(*lines, strict=True)]
    return [rows / sum(sums) for rows in sums]


def _whole(rows: float) -> int:
    return int(-(-rows // 1))


def _place(
    work: Sequence[float], sizes: Sequence[int], ep: int, memory: int | None, router_bytes: int
) -> Plan:
    if memory is None:
        return plan(work, sizes, ep)
    if memory <= router_bytes:
        raise ValueError(
            f"memory: expected more than {router_bytes:,} bytes, which the router of each rank "
            f"needs, got {memory:,}; take devices with more memory, or smaller batches"
        )
    try:
        return plan(work, sizes, ep, memory - router_bytes)
    except ValueError as error:
        raise ValueError(
            f"{error} (of a device's {memory:,} bytes, {router_bytes:,} are the router's)"
        ) from None


def _terms(
    found: Sequence[Costs],
    rows: Sequence[float],
    owners: Sequence[int],
    parameters: int,
    size: int,
    dp: int,
    ep: int,
) -> dict[str, int]:
    """Of a mean rank. Samples are spread over the ranks alike, so of an expert's rows as many come
    from each: all but its owner's own travel."""
    count, terms = len(found), {}
    if ep > 1:
        sent = round(sum(rows) * (ep - 1) / ep**2)
        image, outputs = 3 * size**2, TASK.num_outputs
        terms = ep_bytes(sent, image, outputs, 4, count, ep, parameters, replicas=dp)
    if dp > 1:
        used = sum(c.parameters for c, r in zip(found, rows, strict=True) if r)
        terms = {**dp_bytes(used // ep, count, dp, parameters), **terms}
    return terms


def _sent(terms: dict[str, int], dp: int, ep: int) -> float:
    """An expert's gradients are summed over the replicas, all else over all ranks."""
    experts = {name: size for name, size in terms.items() if name == "expert gradients"}
    others = {name: size for name, size in terms.items() if name not in experts}
    return on_the_wire(experts, dp) + on_the_wire(others, dp * ep)


def _milliseconds(
    models: Sequence[HubModel],
    found: Sequence[Costs],
    rows: Sequence[float],
    device: torch.device,
    tell: Tell,
) -> list[float]:
    """Of forward and backward of each expert on its rows of a step; what is alike is timed once."""
    known: dict[tuple[HubModel, int, int], float] = {}
    for model, costs_, expected in zip(models, found, rows, strict=True):
        key = model, costs_.size, _measured_rows(expected)
        if expected and key not in known:
            tell(f"{model.name} on {key[2]} rows of {costs_.size} px")
            known[key] = _time(*key, device)
    keys = [(m, c.size, _measured_rows(r)) for m, c, r in zip(models, found, rows, strict=True)]
    return [known[key] if expected else 0.0 for key, expected in zip(keys, rows, strict=True)]


def _measured_rows(rows: float) -> int:
    return max(2, _whole(rows))  # BatchNorm refuses a single value a channel


def _time(model: HubModel, size: int, rows: int, device: torch.device) -> float:
    with torch.random.fork_rng(devices=[]):
        network = with_head(model.make(TASK.num_outputs), TASK).to(device).train()
        images = torch.rand(rows, 3, size, size).to(device)
    times = []
    for _ in range(WARM_UPS + REPEATS):
        network.zero_grad(set_to_none=True)
        wait(device)
        began = time.perf_counter()
        network(images).sum().backward()
        wait(device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[WARM_UPS:])
