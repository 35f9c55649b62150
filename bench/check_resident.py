"""Checks of a hub that is larger than its room on the device: ``executor="resident"``.

Experts are tens of megabytes, so that a copy takes longer than an expert: rows that are run on what
has not arrived yet, or on what was overwritten, are wrong. As in ``check_executors``, each check is
a function of a device; what only a GPU has is left out elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hubpath_fast as hp
from hubpath_fast.devices import full_float32
from hubpath_fast.executors import ResidentExecutor
from hubpath_fast.executors.resident.transfers import Transfers

from .children import Write
from .operations import relative_error
from .verdicts import write_verdict

M, C, PX, ROOM = 8, 6, 8, 3
WIDTH = 4096  # 64 MiB of an expert's weights
TOLERANCE = 1e-5  # of float32; the same kernels run on the same rows
STEPS = 8
COPIED, SLEPT = 1 << 28, 100_000_000  # bytes; cycles of the device: about 50 ms


class Expert(nn.Module):
    """A wide layer in the middle, and an output that tells who was asked."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.middle = nn.Linear(3 * PX**2, width), nn.Linear(width, width)
        self.last = nn.Linear(width, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(F.relu(self.first(x.flatten(1))))))


def hub_of(executor: str | ResidentExecutor, device: str, width: int) -> hp.HubPathway:
    """Of the same weights each time; K = 1."""
    torch.manual_seed(0)
    experts = [Expert(width) for _ in range(M)]
    model = hp.HubPathway(experts, hp.PathwayGenerator(M, width=4), k=1, executor=executor)
    return model.to(device)


def batch(step: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(images, targets, noise): it goes to two experts, one of them new since the last one."""
    random = torch.Generator().manual_seed(step)
    x, y = torch.rand(12, 3, PX, PX, generator=random), torch.randint(C, (12,), generator=random)
    chosen = (torch.arange(12) % 2 + step) % M
    noise = F.one_hot(chosen, M) * 1000.0
    return x.to(device), y.to(device), noise.to(device)


def predictions(model: hp.HubPathway, device: str) -> list[Tensor]:
    with torch.no_grad():
        return [model.train()(x, noise).prediction for x, _, noise in _batches(device)]


def training(model: hp.HubPathway, device: str) -> list[Tensor]:
    """Gradients step by step, and the weights that come of them by AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    found = []
    for x, y, noise in _batches(device):
        optimizer.zero_grad()
        hp.HubPathwayLoss()(model(x, noise, target=y), y).total.backward()
        found += [p.grad.detach().clone() for p in model.experts.parameters() if p.grad is not None]
        optimizer.step()
    return found + [p.detach().clone() for p in model.parameters()]


def _batches(device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [batch(step, device) for step in range(STEPS)]


def agreement(write: Write, device: str, width: int = WIDTH) -> None:
    """Predictions and training steps in the room, beside all experts on the device."""
    for title, call in {"predictions": predictions, "training": training}.items():

        def judge(call=call) -> tuple[str | None, dict]:
            with full_float32():
                problem, report, error = _difference(call, device, width)
            return problem, {"text": report, "error": error}

        write_verdict(write, f"resident {title}", judge)


def _difference(
    call: Callable[[hp.HubPathway, str], list[Tensor]], device: str, width: int
) -> tuple[str | None, str, float]:
    model = hub_of(ResidentExecutor(ROOM), "cpu", width).to(device)
    found = call(model, device)
    report = model.executor_report()
    expected = call(hub_of("sequential", device, width), device)
    worst = 0.0
    if len(found) != len(expected):
        return f"{len(found)} tensors, not {len(expected)}", "", worst
    for index, (ours, right) in enumerate(zip(found, expected, strict=True)):
        error = relative_error(ours.cpu(), right.cpu().double())
        worst = max(worst, error)
        if not error <= TOLERANCE:
            return f"tensor {index} of {len(found)} is off by {error:.1e}", "", worst
    if report.misses <= M // 2:
        return f"only {report.misses} experts came: the room was not full", "", worst
    return None, report.room_text, worst


def overlap(write: Write, device: str) -> None:
    """A copy ends while the current stream, which was busy before it, still is."""
    transfers = Transfers(torch.device(device))
    here, there = transfers.host(COPIED), transfers.memory(COPIED)
    here.fill_(7)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEPT)
    busy = torch.cuda.Event()
    busy.record()
    arrived = transfers.bring(there, here)
    arrived.synchronize()
    beside = not busy.query()
    transfers.use(there, arrived)
    right = bool((there == 7).all())
    if beside and right:
        write("resident copies", text="beside the current stream")
    else:
        note = "the bytes are other ones" if beside else "they wait for the current stream"
        write("resident copies", ok=False, note=note)
