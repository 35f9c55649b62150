"""A hub that is larger than its room, trained on the emulated device: prints the host's waits of
each step, races, and whether the results are those of all experts on the device, as JSON.

``python -m bench.emulated -m support.room_on_device``; tests/emulated/test_room_on_device.py judges
it.
"""

from __future__ import annotations

import copy
import json

import torch
from torch import Tensor, nn

import hubpath_fast as hp
from bench.emulated.device import counts
from hubpath_fast import resting
from hubpath_fast.executors import ResidentExecutor
from hubpath_fast.executors.resident.transfers import Transfers

CUDA = torch.device("cuda")
EXPERTS, ROOM, STEPS, SAMPLES = 6, 3, 10, 4


def expert() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


def noise(step: int) -> Tensor:
    """By which all samples go to two experts, other ones in each step: those of the last leave."""
    eps = torch.zeros(SAMPLES, EXPERTS)
    eps[:, [2 * step % EXPERTS, (2 * step + 1) % EXPERTS]] = 1000
    return eps


def train(model: nn.Module) -> dict[str, object]:
    """The waits of the steps, and the values of parameters, buffers and momentum."""
    model.to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion, random = hp.HubPathwayLoss(), torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, SAMPLES, 3, 8, 8, generator=random).to(CUDA)
    y = torch.randint(3, (STEPS, SAMPLES), generator=random).to(CUDA)
    eps, waits = torch.stack([noise(step) for step in range(STEPS)]).to(CUDA), []
    for step in range(STEPS):
        counts.reset()
        optimizer.zero_grad()
        loss = criterion(model(x[step], eps=eps[step], target=y[step]), y[step]).total
        loss.backward()
        optimizer.step()
        waits.append(counts.waits())
    counts.reset()
    with torch.no_grad():
        model(x[0], eps=eps[0])
    prediction = counts.waits()
    resting.bring_home(model.parameters())
    state = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    values = [t.detach().cpu() for t in (*model.state_dict().values(), *state)]
    return {"waits": waits, "prediction": prediction, "values": values}


def freeze_bodies(model: nn.Module) -> nn.Module:
    for each in model.experts:
        each[:-1].requires_grad_(False)
    return model


def sent() -> dict[str, object]:
    """What a copy to the host brings of memory that is freed, and taken again, meanwhile."""
    transfers = Transfers(CUDA)
    home, there = transfers.host(8), torch.full((8,), 3, dtype=torch.uint8, device=CUDA)
    counts.reset()
    transfers.send(home, there)
    del there
    torch.zeros(8, dtype=torch.uint8, device=CUDA)
    before = home.tolist()
    transfers.arrive(), transfers.arrive()
    return {
        "before": before, "after": home.tolist(),
        "waits": counts.waits(), "races": counts.take_races(),
    }  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    model = hp.HubPathway(
        [expert() for _ in range(EXPERTS)], hp.PathwayGenerator(EXPERTS, width=4), k=2
    )
    found: dict[str, object] = {"sent": sent()}
    for name, change in (("all", lambda model: model), ("heads", freeze_bodies)):
        mine, expected = (change(copy.deepcopy(model)) for _ in range(2))
        mine.executor, expected.executor = ResidentExecutor(ROOM), "sequential"
        counts.take_races()
        mine_found, expected_found = train(mine), train(expected)
        pairs = zip(mine_found.pop("values"), expected_found.pop("values"), strict=True)
        there = mine.experts[0] = copy.deepcopy(expected.experts[0])
        mine.executor.settle(mine.experts)
        true = [t for t in expected.experts[0].state_dict().values() if t.numel()]
        here = [t for t in there.state_dict().values() if t.numel()]
        found[name] = {
            "resident": mine_found, "sequential": expected_found, "races": counts.take_races(),
            "equal": all(torch.equal(*pair) for pair in pairs),
            "settled": all(map(torch.equal, here, [t.cpu() for t in true])),
            "misses": mine.executor_report().misses,
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
