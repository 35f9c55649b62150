"""Checks of training on several ranks where there is one GPU.

NCCL refuses two ranks on one device. So the exchange of rows is checked on tensors of the GPU with
two ranks that share it, by gloo, which takes them through the host; and NCCL with one rank, whose
rows travel to itself. Ranks are forked from a process that has not touched CUDA, so they import
nothing anew.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import hubpath_fast as hp
from hubpath_fast import functional as HF
from hubpath_fast import parallel
from hubpath_fast.devices import full_float32
from hubpath_fast.parallel import Ranks
from hubpath_fast.parallel.collectives import gather_numbers
from hubpath_fast.parallel.exchange import Exchange

from .check_executors import NETWORKS, C, K, M, N, batches, make_hub
from .children import Write, die_with, first_line
from .operations import relative_error

RANKS, STEPS = 2, 6
SECONDS = 20  # that all of it may take
TOLERANCE = 1e-4  # of float32, as of ``check_executors``: sums are in another order
LAYOUTS = {"ep": "BatchNorm", "dp": "LayerNorm"}  # replicas have batch statistics of their own
Found = dict[str, Tensor]


def agreement(write: Write, device: str, backend: str) -> None:
    """Two ranks on one device against one process on the same batches; then what a rank sends
    itself by ``backend``, as ``init_process_group`` takes it, and sums of its own numbers.

    All of them run at once. Lines are written when all are known: what stands in them may ask the
    device, and no process that did may fork ranks.
    """
    started = [
        _Ranks(RANKS, "gloo", _all_trained, device),
        _Ranks(1, "gloo", _all_trained, device),
        _Ranks(1, backend, _to_itself, device),
    ]
    calls: dict[str, Callable[[], tuple[str | None, float]]] = {
        f"{RANKS} ranks {layout}": partial(_unlike_one, layout, *started[:2]) for layout in LAYOUTS
    }
    calls[f"one rank, {backend}"] = partial(_untrue, started[2])
    found = {}
    for text, call in calls.items():
        try:
            found[text] = call()
        except Exception as failure:
            found[text] = first_line(failure), math.nan
    for text, (problem, error) in found.items():
        if problem is None:
            write(text, error=error)
        else:
            write(text, ok=False, note=problem)


def _untrue(started: _Ranks) -> tuple[str | None, float]:
    [facts] = started.results()
    wrong = [fact for fact, holds in facts.items() if not holds]
    return ("not so: " + "; ".join(wrong) if wrong else None), 0.0


def _unlike_one(layout: str, several: _Ranks, one: _Ranks) -> tuple[str | None, float]:
    each = [found[layout] for found in several.results()]
    [expected] = [found[layout] for found in one.results()]
    losses = torch.stack([own["losses"] for own in each]).mean(dim=0)
    worst = relative_error(losses, expected["losses"].double())
    if not worst <= TOLERANCE:
        return f"losses are off by {worst:.1e}", worst
    for rank, own in enumerate(each):
        for name in own.keys() - {"losses"}:
            error = relative_error(own[name], expected[name].double())
            worst = max(worst, error)
            if not error <= TOLERANCE:
                return f"rank {rank}: {name} is off by {error:.1e}", worst
    if set().union(*each) != set(expected):
        return f"no rank has {sorted(set(expected).difference(*each))}", worst
    return None, worst


def _all_trained(device: str) -> dict[str, Found]:
    return {layout: _trained(layout, device) for layout in LAYOUTS}


def _trained(layout: str, device: str) -> Found:
    """Losses and weights, those that are here, of some steps of SGD on this rank's samples."""
    ranks = parallel.start(layout)
    torch.manual_seed(0)
    model = make_hub([NETWORKS[LAYOUTS[layout]]() for _ in range(M)], "auto").to(device)
    model = model.to(memory_format=torch.channels_last).distribute(ranks).train()
    gradients = parallel.Gradients(model, ranks)
    here = {name: p for name, p in model.named_parameters() if not p.is_meta}
    optimizer = torch.optim.SGD(here.values(), lr=0.05)
    losses, mine = [], ranks.share().positions(N)
    for step, (x, y, _) in enumerate(batches(device, STEPS)):
        optimizer.zero_grad()
        output = model(x[mine], HF.NoiseDraw(step, int(mine[0])))
        loss = hp.HubPathwayLoss()(output, y[mine]).total
        loss.backward()
        if not ranks.single:
            gradients.average(output.routing.counts())
        optimizer.step()
        losses.append(loss.detach().cpu())
    found = {name: p.detach().cpu() for name, p in here.items()}
    return found | {"losses": torch.stack(losses)}


class _One(Ranks):
    """A rank that is alone and exchanges all the same."""

    single = False


def _to_itself(device: str) -> dict[str, bool]:
    parallel.connection.make_groups(0, 1, 1, SECONDS)
    x = torch.randint(256, (N, 3, 4, 4), dtype=torch.uint8, device=device)
    scores = torch.randn(N, M, device=device)
    routing = HF.noisy_topk(scores, torch.zeros_like(scores), K)
    exchange = Exchange(routing, (0,) * M, _One())
    rows = HF.gather(exchange.to_owners(x), exchange.plan())
    outputs = torch.randn(N * K, C, device=device).requires_grad_()
    back = exchange.to_samples(outputs)
    upstream = torch.randn_like(back)
    (gradient,) = torch.autograd.grad(back, outputs, upstream)
    numbers, total = torch.arange(5, device=device), torch.rand(7, device=device)
    summed = total.clone()
    dist.all_reduce(summed)
    dist.all_reduce(numbers.clone(), dist.ReduceOp.MAX)
    return {
        "rows are those of the experts": torch.equal(rows, HF.gather(x, routing)),
        "outputs come back": torch.equal(back, outputs),
        "their gradients go": torch.equal(gradient, upstream),
        "numbers are gathered": torch.equal(gather_numbers(numbers, _One(), "n")[0], numbers),
        "sums are the terms": torch.equal(summed, total),
    }


class _Ranks:
    """Processes that run function(*arguments), one for each rank."""

    def __init__(self, ranks: int, backend: str, function: Callable, *arguments):
        self.folder = tempfile.TemporaryDirectory()
        context, given = multiprocessing.get_context("fork"), (ranks, backend, function, arguments)
        self.deadline = time.monotonic() + SECONDS
        self.processes = [
            context.Process(target=_be_rank, args=(r, os.getpid(), Path(self.folder.name), *given))
            for r in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def results(self) -> list:
        """What it returned on each rank; RuntimeError where one failed, or is not done in time."""
        for process in self.processes:
            process.join(max(0.0, self.deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        folder = Path(self.folder.name)
        for rank, code in enumerate(codes):
            if code != 0:
                note = folder / f"{rank}.txt"
                late = f"not done within {SECONDS} s" if code is None else f"ended with {code}"
                raise RuntimeError(f"rank {rank}: {note.read_text() if note.exists() else late}")
        return [torch.load(folder / f"{rank}.pt") for rank in range(len(codes))]


def _be_rank(
    rank: int, parent: int, folder: Path, ranks: int, backend: str, function: Callable, arguments
) -> None:
    die_with(parent)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=SECONDS),
        )  # fmt: skip
        with full_float32():
            found = function(*arguments)
        torch.save(found, folder / f"{rank}.pt")
        dist.destroy_process_group()
    except Exception as error:
        (folder / f"{rank}.txt").write_text(first_line(error))
        raise
