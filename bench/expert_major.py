"""Predictions of many images by a hub larger than memory, batch by batch and expert by expert.

    python -m bench.expert_major [--experts 64] [--room 4] [--name test_resnet] [--px 64]
                                 [--images 2000] [--batch 32] [--k 2] [--rounds 3]

A hub of random weights is saved into a temporary folder and opened twice: with all experts in
memory, and with ``room`` for a few. Each round predicts the same uint8 images in each way, after a
round that is not timed; the files are in the page cache. Every way's predictions are compared with
those of batch by batch first. Loads are those of one round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import hubpath_fast as hp

from . import records

AGREE = 1e-5  # of the largest output: float32 in groups of another size


def images(count: int, px: int) -> Tensor:
    """uint8 [count, 3, px, px] of different colours and contrasts, for a router to tell apart."""
    draw = torch.Generator().manual_seed(1)
    colours = torch.rand(count, 3, 1, 1, generator=draw)
    contrasts = torch.rand(count, 1, 1, 1, generator=draw)
    noise = torch.rand(count, 3, px, px, generator=draw) - 0.5
    return (255 * (colours + contrasts * noise).clamp(0, 1)).byte()


@torch.no_grad()
def save(folder: Path, name: str, experts: int, k: int, examples: Tensor) -> None:
    """A hub of random weights, whose router gives each expert some of the images."""
    torch.manual_seed(0)
    size = examples.shape[-1]
    model = hp.create_model([name] * experts, 10, k=k, pretrained=False, input_size=size).eval()
    layer = model.generator.clean
    torch.nn.init.normal_(layer.weight)
    std, mean = torch.std_mean(model.scores(examples)[0], dim=0)
    layer.weight.mul_(4 / std[:, None])
    layer.bias.sub_(mean).mul_(4 / std)
    model.save_pretrained(folder)


def batch_by_batch(model: hp.HubPathway, batches: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(x) for x in batches])


def expert_by_expert(model: hp.HubPathway, batches: list[Tensor]) -> Tensor:
    return torch.cat(list(model.predict_expert_major(batches)))


def loads(model: hp.HubPathway, way: Callable[[], Tensor]) -> int:
    """How often an expert is brought in; where all are resident, never."""
    before = getattr(model.executor_report(), "misses", 0)
    way()
    return model.executor_report().misses - before


def seconds(way: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--room", type=int, default=4, help="experts in memory at a time")
    parser.add_argument("--name", default="test_resnet", help="of timm, for all experts")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    batches = list(images(given.images, given.px).split(given.batch))
    with tempfile.TemporaryDirectory() as place:
        save(Path(place), given.name, given.experts, given.k, torch.cat(batches[:8]))
        models = {
            "all": hp.from_pretrained(place),
            str(given.room): hp.from_pretrained(place, room=given.room),
        }
        ways = {
            (order.__name__.replace("_", " "), room): partial(order, model, batches)
            for room, model in models.items()
            for order in (batch_by_batch, expert_by_expert)
        }
        _print(given, models, ways)


def _print(given, models: dict[str, hp.HubPathway], ways: dict[tuple, Callable]) -> None:
    first = next(iter(ways))
    expected = ways[first]()
    brought, times = {}, {key: [] for key in ways}
    for (order, room), way in ways.items():
        brought[order, room] = loads(models[room], way)
        error = ((way() - expected).abs().max() / expected.abs().max()).item()
        if error > AGREE:
            raise RuntimeError(f"{order}, room for {room}: predictions differ by {error:.1e}")
    for _ in range(given.rounds):
        for key, way in ways.items():
            times[key].append(seconds(way))
    about = records.environment("cpu")
    print(
        f"{given.images} images of {given.px} px in batches of {given.batch}, {given.experts} "
        f"{given.name}, K = {given.k}; {about['device']}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| order | experts in memory | brought in | seconds | over all in memory |")
    print("|---|---:|---:|---:|---:|")
    base = statistics.median(times[first])
    for (order, room), own in times.items():
        middle = statistics.median(own)
        print(f"| {order} | {room} | {brought[order, room]} | {middle:.2f} | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
