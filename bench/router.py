"""The router's share of what a hub costs on a CPU: of FLOPs, of a training step, of a prediction.

    python -m bench.router [--only TEXT] [--seconds 10] [--out FILE]

Of each hub, with random weights and the default router: the router's FLOPs for an image over those
of K mean experts; and the time of the router alone, over that of the whole. Of a step, that is the
router's forward and backward pass over forward, losses, backward and update of the hub; of a
prediction, its forward pass. The parts of a hub are timed in turns, and of each the fastest round
counts, which other processes disturb least. Where a share is above its goal, the row says "missed".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from hubpath_fast.hub import create_model
from hubpath_fast.hub.costs import router_share
from hubpath_fast.hub.router import ROUTER_SHARE
from hubpath_fast.model import HubPathway, HubPathwayLoss

from . import jsonl, records
from .timing import Times, interleaved

TIME_SHARE = 0.10  # of a step and of a prediction, at most
K, CLASSES = 2, 10
LITE = tuple(f"timm/tf_efficientnet_lite{i}" for i in range(3))  # whatever the weights, as dear


@dataclass(frozen=True)
class Setting:
    """size: pixels a side. batch: images of a step and of a prediction."""

    name: str
    hub: str | tuple[str, ...]
    size: int
    batch: int


SETTINGS = (
    Setting("digits", "tiny", 32, 48),
    Setting("lite", LITE, 96, 32),
    Setting("lite", LITE, 224, 4),
    Setting("resnet50", ("timm/resnet50",) * 5, 224, 4),
)


def calls(model: HubPathway, setting: Setting) -> dict[str, Callable[[], object]]:
    """What is timed, by name: the whole and the router, in training and at prediction."""
    x = torch.rand(setting.batch, 3, setting.size, setting.size)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (setting.batch,))
    criterion = HubPathwayLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        criterion(model(x), y).total.backward()
        optimizer.step()

    def route() -> None:
        model.generator.train()
        clean, noise = model.generator(x)
        (F.softmax(clean, 1).square().sum() + noise.sum()).backward()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def predict() -> None:
        model.eval()
        model(x)

    @torch.no_grad()
    def route_prediction() -> None:
        model.generator.eval()
        model.generator(x)

    return {
        "step": step, "router of a step": route,
        "prediction": predict, "router of a prediction": route_prediction,
    }  # fmt: skip


def measure(setting: Setting, seconds: float) -> dict:
    """A row: shares, and the times that they are of, in seconds."""
    torch.manual_seed(0)
    model = create_model(setting.hub, CLASSES, K, pretrained=False, input_size=setting.size)
    model = model.to(memory_format=torch.channels_last)
    times = interleaved(calls(model, setting), seconds=seconds, min_rounds=3, calls=1)
    generator = model.generator
    return {
        "hub": setting.name, "size": setting.size, "batch": setting.batch,
        "width": generator.width, "stride": generator.stride,
        "flops_share": router_share(model, setting.size),
        "step_share": _share(times, "step"), "prediction_share": _share(times, "prediction"),
        "seconds": {name: [t.best, t.p20, t.p50, t.p80] for name, t in times.items()},
        **records.environment("cpu"),
    }  # fmt: skip


def _share(times: dict[str, Times], whole: str) -> float:
    return times[f"router of a {whole}"].best / times[whole].best


def missed(row: dict) -> list[str]:
    """Of which shares a row misses the goal."""
    goals = {"flops": ROUTER_SHARE, "step": TIME_SHARE, "prediction": TIME_SHARE}
    return [name for name, goal in goals.items() if row[f"{name}_share"] > goal]


def show(row: dict) -> str:
    shares = "".join(f"{100 * row[f'{n}_share']:>12.1f}" for n in ("flops", "step", "prediction"))
    router = f"width {row['width']}, on {row['size'] // row['stride']} px"
    names = ", ".join(missed(row))
    return f"{row['hub']:<10}{row['size']:>5}{row['batch']:>7}  {router:<20}{shares}" + (
        f"  missed: {names}" if names else ""
    )


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m bench.router", description=__doc__)
    parser.add_argument("--only", help="hubs whose name holds this text")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a hub, at least 3 rounds")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    args = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    print(f"{records.device_name('cpu')}, {torch.get_num_threads()} threads; the router's share, %")
    print(
        f"{'hub':<10}{'px':>5}{'batch':>7}  {'router':<20}{'FLOPs':>12}{'step':>12}{'predict':>12}"
    )
    rows = []
    for setting in SETTINGS:
        if args.only is None or args.only in setting.name:
            rows.append(measure(setting, args.seconds))
            print(show(rows[-1]), flush=True)
            if args.out is not None:
                jsonl.write(args.out, rows[-1:])
    goal = f"FLOPs {100 * ROUTER_SHARE:.0f}, step and prediction {100 * TIME_SHARE:.0f}"
    failures = sum(bool(missed(row)) for row in rows)
    print(f"goals, at most, in %: {goal}; {failures} of {len(rows)} rows miss one")
    return rows


if __name__ == "__main__":
    main()
