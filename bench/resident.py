"""Predictions of a hub that does not fit, against the same hub with all experts in memory.

``python -m bench.resident`` gives a hub of 64 experts room for a few, and batches whose experts are
found in memory as often as asked: most are of a few hot experts, the others of all. Both forms run
the same batches in turn; the ratio of their means is what the room costs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import hubpath_fast as hp
from hubpath_fast.model import FixedRoutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--room", type=int, default=4, help="experts")
    parser.add_argument("--hit-rate", type=float, default=0.9)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--samples", type=int, default=16, help="of a batch")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder) / "hub")


def compare(options: argparse.Namespace, folder: Path) -> None:
    names, size = ["test_resnet"] * options.experts, options.size
    made = hp.create_model(names, num_outputs=10, pretrained=False, input_size=size, k=1)
    made.save_pretrained(folder)
    del made
    room, whole = hp.from_pretrained(folder, room=options.room), hp.from_pretrained(folder)
    whole.executor = "sequential"
    random = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"room": [], "whole": []}
    routes = [FixedRoutes([i], [1.0], options.experts) for i in range(options.experts)]
    hot = options.room - 1  # the last place is for the others, who come and go
    for step in range(options.batches):
        cold = torch.rand((), generator=random) > options.hit_rate
        low, high = (hot, options.experts) if cold else (0, hot)
        expert = int(torch.randint(low, high, (), generator=random))
        x = torch.rand(options.samples, 3, size, size, generator=random)
        found = {}
        for name, model in (("room", room), ("whole", whole)):
            model.generator = routes[expert]
            with torch.inference_mode():
                start = time.perf_counter()
                found[name] = model(x)
                seconds[name].append(time.perf_counter() - start)
        if not torch.equal(found["room"], found["whole"]):
            raise SystemExit(f"step {step}: the predictions differ")
    report = room.executor_report()
    mean = {name: statistics.fmean(times) for name, times in seconds.items()}
    print(report)
    print(f"hit rate {report.hits / (report.hits + report.misses):.1%}")
    for name, each in mean.items():
        print(f"{name}: {1e3 * each:.3f} ms per batch, {options.samples / each:.0f} images/s")
    print(f"throughput with room {mean['whole'] / mean['room']:.3f} of all in memory")


if __name__ == "__main__":
    main()
