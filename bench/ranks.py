"""Training steps on several processes of this machine: ``python -m bench.ranks``.

One process with one thread, and two with one thread each, train the same hub on the same global
batches, in turns; the experts are shared out, or every process has all of them. Before anything is
timed the losses of all ways are compared. What ranks exchange is counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hubpath_fast as hp
from hubpath_fast.hub.costs import costs
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.spec import read_specs, split_names
from hubpath_fast.parallel import Gradients, Ranks, Share, counted
from hubpath_fast.parallel.placement import plan

LAYOUTS = {"one process": 1, "ep": 2, "dp": 2}
CLASSES = 10


def owners(hub: str, size: int, ranks: Ranks) -> tuple[int, ...] | None:
    """By what the experts cost, as ``hubpath fit`` places them."""
    if ranks.ep == 1:
        return None
    counted = [costs(find(spec), size) for spec in read_specs(split_names(hub))]
    return plan([each.work for each in counted], [0] * len(counted), ranks.ep).owners


def train(layout: str, world: int, hub: str, size: int, batch: int, steps: int) -> dict:
    """Seconds of each step, the last loss, and the bytes of a step by what for."""
    ranks = hp.parallel.start(None if world == 1 else layout)
    torch.manual_seed(0)
    model = hp.create_model(hub, num_outputs=CLASSES, pretrained=False, input_size=size)
    model.distribute(ranks, owners(hub, size, ranks))
    gradients, criterion = Gradients(model, ranks), hp.HubPathwayLoss()
    own = [p for p in model.parameters() if not p.is_meta]
    optimizer = torch.optim.SGD(own, 0.01, momentum=0.9)
    mine = Share(ranks.rank, ranks.world).positions(batch)
    draw = torch.Generator().manual_seed(1)
    seconds, bytes_, loss = [], {}, 0.0
    for step in range(steps):
        x = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=draw)
        y = torch.randint(0, CLASSES, (batch,), generator=draw)
        if not ranks.single:
            dist.barrier()
        began = time.perf_counter()
        with counted() as traffic:
            optimizer.zero_grad()
            eps = hp.functional.NoiseDraw(step, int(mine[0]))
            out = model(x[mine], eps, target=y[mine])
            losses = criterion(out, y[mine])
            losses.total.backward()
            if not ranks.single:
                gradients.average(out.routing.counts())
            optimizer.step()
        seconds.append(time.perf_counter() - began)
        bytes_, loss = dict(traffic), losses.total.item()
    return {"seconds": seconds, "loss": loss, "bytes": bytes_}


def _main(rank: int, store: str, layout: str, world: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = train(layout, world, *arguments)
    Path(f"{store}.{rank}").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(layout: str, *arguments: object) -> list[dict]:
    """What ``train`` says on each rank, in new processes."""
    world = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.start_processes(_main, (store, layout, world, arguments), world, start_method="spawn")
        return [json.loads(Path(f"{store}.{rank}").read_text()) for rank in range(world)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hub", default="tiny", help="names of the experts")
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--batch", type=int, default=48, help="samples of all ranks")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    work = (args.hub, args.size, args.batch, args.steps)
    times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    losses, bytes_ = {}, {}
    for _ in range(args.rounds):
        for layout in LAYOUTS:
            found = measure(layout, *work)
            # A step ends when the last rank has ended it; the first ones prepare what others reuse.
            steps = [max(each) for each in zip(*(f["seconds"] for f in found), strict=True)]
            times[layout].append(statistics.median(steps[args.steps // 3 :]))
            losses[layout] = statistics.fmean(f["loss"] for f in found)
            bytes_[layout] = found[0]["bytes"]
    if abs(losses["ep"] - losses["one process"]) > 1e-3 * abs(losses["one process"]):
        raise SystemExit(f"the losses differ: {losses}")
    one = times["one process"]
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {date.today()}: "
        f"{args.hub} at {args.size} px, {args.batch} samples a step, one thread a process"
    )
    for layout, own in times.items():
        ratios = sorted(a / b for a, b in zip(one, own, strict=True))
        print(
            f"{layout:<12} {1e3 * statistics.median(own):7.1f} ms a step, "
            f"{statistics.median(ratios):.2f} x one process ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
        if bytes_[layout]:
            print("  rank 0 hands over, in bytes a step: " + json.dumps(bytes_[layout]))


if __name__ == "__main__":
    main()
