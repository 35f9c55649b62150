"""Images per second of the training pipeline, beside what a training step consumes.

    python -m bench.data [--dataset NAME --data-root DIR] [--size 224] [--batch-size 48]
                         [--workers 0,2,4] [--caches none,memory,disk]
                         [--consumes IMAGES_PER_S | --hub NAME --device cuda] [--out FILE]

Without a data set it writes JPEGs of 500 x 375 pixels, about the size of an ImageNet photograph.
Rows: each number of worker processes, with and without a cache of decoded images; every row does
all that training does: decode (or read the cache), resize, random crop, flip, batch, and copy to
the device. Before it is timed, a row's first batch is compared, byte for byte, with that of the
plain row. --consumes says what a step takes, for example from `bench.step`; --hub measures it here,
with random weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hubpath_fast.data import (
    CACHES,
    ImageDataset,
    ImageSplits,
    TrainStream,
    cache_splits,
    open_dataset,
    train_transform,
)
from hubpath_fast.data.images import default_workers
from hubpath_fast.data.transforms import resized_side
from hubpath_fast.hub import create_model
from hubpath_fast.model import HubPathwayLoss

from . import jsonl, records

CLASSES, IMAGES = 4, 256  # of the data set that is written where none is given
WIDTH, HEIGHT = 500, 375


@dataclass(frozen=True)
class Setting:
    """What all rows share. seconds: of each measurement."""

    size: int
    batch_size: int
    device: str
    seconds: float


def write_photographs(root: Path, count: int = IMAGES) -> Path:
    """JPEGs with as much detail as photographs have: about 80 kB each at quality 90."""
    random = np.random.RandomState(0)
    for i in range(count):
        folder = root / f"class{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        small = random.randint(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.jpg", quality=90)
    return root


def make_stream(splits: ImageSplits, workers: int, setting: Setting) -> TrainStream:
    dataset = ImageDataset(splits.train, train_transform(setting.size))
    return TrainStream(dataset, setting.batch_size, 0, workers, setting.device)


def images_per_second(stream: TrainStream, setting: Setting) -> float:
    """In a steady state: what workers had decoded in advance is taken first, off the clock."""
    batches: Iterator = stream.batches()
    try:
        for _ in islice(batches, stream.workers * stream.prefetch + 2):
            pass
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < setting.seconds:
            images += len(next(batches)[0])
        if setting.device != "cpu":
            torch.cuda.synchronize()
        return images / (time.perf_counter() - began)
    finally:
        batches.close()


def first_batch(stream: TrainStream) -> torch.Tensor:
    batches = stream.batches()
    try:
        return next(batches)[0].cpu()
    finally:
        batches.close()


def consumption(hub: str, setting: Setting, classes: int = 100, k: int = 2) -> float:
    """Images per second that training of a hub takes, on images that are on the device already."""
    names = [name.strip() for name in hub.split(",")]
    model = create_model(names, classes, k, pretrained=False, input_size=setting.size)
    model.to(setting.device).train()
    criterion = HubPathwayLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    shape = (setting.batch_size, 3, setting.size, setting.size)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device)
    y = torch.randint(0, classes, (setting.batch_size,), device=setting.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(model(x), y).total.backward()
        optimizer.step()
        if setting.device != "cpu":
            torch.cuda.synchronize()

    for _ in range(5):
        step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < setting.seconds:
        step()
        steps += 1
    return steps * setting.batch_size / (time.perf_counter() - began)


def measure(
    splits: ImageSplits,
    workers: list[int],
    caches: list[str],
    setting: Setting,
    consumes: float | None,
    cache_dir: str | Path,
) -> list[dict]:
    """A row for each cache and number of workers; the time to make a cache is its own column."""
    expected = first_batch(make_stream(splits, 0, setting))
    rows = []
    for cache in caches:
        began = time.perf_counter()
        ready = cache_splits(splits, resized_side(setting.size), cache, cache_dir)
        made = time.perf_counter() - began if cache != "none" else None
        for count in workers:
            stream = make_stream(ready, count, setting)
            if not torch.equal(first_batch(stream), expected):
                raise RuntimeError(f"cache {cache}, {count} workers: other bytes than decoding")
            rate = images_per_second(stream, setting)
            row = {
                "cache": cache,
                "workers": count,
                "images_per_second": rate,
                "cache_seconds": made,
                "consumes": consumes,
                "over_consumption": None if consumes is None else rate / consumes,
            }
            rows.append(row)
    return rows


def print_rows(rows: list[dict], consumes: float | None) -> None:
    print(f"{'cache':<8}{'workers':>8}{'images/s':>10}{'of the step':>13}{'to make it':>12}")
    for row in rows:
        share = row["over_consumption"]
        ratio = "" if share is None else f"{share:.2f}x"
        made = "" if row["cache_seconds"] is None else f"{row['cache_seconds']:.1f} s"
        slow = "  the step waits" if share is not None and share < 1 else ""
        print(
            f"{row['cache']:<8}{row['workers']:>8}{row['images_per_second']:>10.0f}"
            f"{ratio:>13}{made:>12}{slow}"
        )
    if consumes is not None:
        print(f"the step consumes {consumes:.0f} images/s")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--workers", default=f"0,{default_workers()}")
    parser.add_argument("--caches", default=",".join(CACHES))
    parser.add_argument("--images", type=int, default=IMAGES, help="to write, without a data set")
    parser.add_argument("--consumes", type=float, help="images/s of a step")
    parser.add_argument("--hub", help="measure what a step of this hub consumes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    args = parser.parse_args(arguments)
    if args.consumes is not None and args.hub is not None:
        parser.error("--consumes and --hub both say what a step consumes; give one of them")
    args.workers = [int(count) for count in args.workers.split(",")]
    args.caches = args.caches.split(",")
    return args


def main(arguments: list[str] | None = None) -> list[dict]:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    setting = Setting(args.size, args.batch_size, args.device, args.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        own = args.data_root is None and args.dataset == "folder"
        root = write_photographs(Path(scratch) / "images", args.images) if own else args.data_root
        splits = open_dataset(args.dataset, root, verify=False)
        consumes = consumption(args.hub, setting) if args.hub else args.consumes
        rows = measure(
            splits, args.workers, args.caches, setting, consumes, Path(scratch) / "cache"
        )
    print_rows(rows, consumes)
    if args.out is not None:
        shared = {**records.environment(args.device), "hub": args.hub, **vars(setting)}
        jsonl.write(args.out, [{**shared, **row} for row in rows])
    return rows


if __name__ == "__main__":
    main()
