"""Faces per second of the landmarks' training pipeline, from photographs and from the cache.

    python -m bench.faces [--dataset NAME --data-root DIR] [--size 256] [--batch-size 16]
                          [--workers 2] [--seconds 5] [--out FILE]

Without a data set it writes JPEGs of 1024 pixels a side, with as much detail as photographs have,
and one face in each, of sizes as they come in WFLW: most fill a fifth to a half of the side. Rows
do all that training does: decode (or read the cache), cut, mirror, turn, scale and crop in one
warp, targets, batch. Before it is timed, a row's first batch is compared, byte for byte, with that
of the plain row without workers.

Then a face's way in one thread, by stage, in milliseconds of processor time: the mean over faces
that are read one after another, so that nothing stays in a core's own cache. With two cores, a
face may take 15 ms for 130 a second, and 3.3 ms for 600.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hubpath_fast.data import TrainStream
from hubpath_fast.data.order import Draw
from hubpath_fast.tasks.landmarks import (
    LAYOUTS,
    Face,
    FaceAugment,
    FaceDataset,
    FaceSplit,
    FaceSplits,
    box_of_points,
    open_faces,
)
from hubpath_fast.tasks.landmarks.cache import cache_faces
from hubpath_fast.tasks.landmarks.windows import cut, find_place, read_crop

from . import jsonl, records

SIDE, FACES = 1024, 128  # of the photographs that are written where no data set is given
QUALITY = 90
SHARES = (0.15, 0.6)  # of a photograph's side that a face fills, at least and at most
GOALS = {"none": 130, "disk": 600}  # faces a second on two cores


def write_photographs(root: Path, count: int = FACES, side: int = SIDE) -> FaceSplits:
    """A set of ``count`` faces in as many JPEGs, about 200 kB each."""
    random, layout = np.random.RandomState(0), LAYOUTS["wflw"]
    root.mkdir(parents=True, exist_ok=True)
    faces = []
    for i in range(count):
        coarse = random.randint(0, 256, (side // 12, side // 12, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        path = root / f"{i}.jpg"
        image.save(path, quality=QUALITY)
        extent = side * np.exp(random.uniform(*np.log(SHARES)))
        corner = random.uniform(0, side - extent, 2)
        points = torch.from_numpy(corner + extent * random.rand(layout.num_points, 2))
        scale, x, y = box_of_points(points)
        size = (side, side)
        faces.append(Face(path.name, points, (x, y), scale, path, path, i + 2, size=size))
    train = FaceSplit(tuple(faces), layout)
    return FaceSplits(layout, train, train.subset([]), train.subset([]), False)


def faces_per_second(stream: TrainStream, seconds: float) -> float:
    """In a steady state: what workers had read in advance is taken first, off the clock."""
    batches: Iterator = stream.batches()
    try:
        for _ in islice(batches, stream.workers * stream.prefetch + 2):
            pass
        began, faces = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            faces += len(next(batches)[0])
        return faces / (time.perf_counter() - began)
    finally:
        batches.close()


def first_batch(stream: TrainStream) -> tuple[torch.Tensor, torch.Tensor]:
    batches = stream.batches()
    try:
        return next(batches)
    finally:
        batches.close()


def measure(
    splits: FaceSplits, size: int, batch: int, workers: int, seconds: float, folder: Path
) -> list[dict]:
    """A row for the photographs and one for the cache, which is made first, on its own clock."""

    def stream(given: FaceSplits, count: int) -> TrainStream:
        dataset = FaceDataset(given.train, size, augment=FaceAugment())
        return TrainStream(dataset, batch, 0, count)

    expected = first_batch(stream(splits, 0))
    rows = []
    for cache, goal in GOALS.items():
        began = time.perf_counter()
        ready = cache_faces(splits, size, FaceAugment(), cache, folder)
        made = time.perf_counter() - began if cache != "none" else None
        found = first_batch(stream(ready, workers))
        if not all(map(torch.equal, found, expected)):
            raise RuntimeError(f"cache {cache}, {workers} workers: other bytes than decoding")
        row = {
            "cache": cache,
            "workers": workers,
            "faces_per_second": faces_per_second(stream(ready, workers), seconds),
            "goal": goal,
            "cache_seconds": made,
            "ms": stages(ready.train, size),
        }
        rows.append(row)
    return rows


def stages(split: FaceSplit, size: int) -> dict[str, float]:
    """Milliseconds a face in one thread: of each stage, and of the whole in batches of 16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset = FaceDataset(split, size, augment=FaceAugment())
        return {**_stages(dataset), "whole": _whole(dataset)}
    finally:
        torch.set_num_threads(threads)


def _stages(dataset: FaceDataset) -> dict[str, float]:
    spent: dict[str, float] = {}

    def clocked(stage: str, work: Callable):
        began = time.process_time()
        found = work()
        spent[stage] = spent.get(stage, 0.0) + 1e3 * (time.process_time() - began)
        return found

    split, count, origin = dataset.split, len(dataset), dataset.split.layout.origin
    for i in range(count):
        face = split.faces[i]
        if split.store is None:
            image = clocked("decode", lambda i=i: split.load(i))
            place = find_place(face, dataset.size, dataset.reach, image.shape[2], image.shape[1])
            window = clocked("cut", lambda image=image, place=place: cut(image, place))
        else:
            window = clocked("read", lambda i=i: dataset.window(i))
        keys = [Draw(i, i)]
        draws = [dataset._draws(key) for key in keys]
        matrices, mirrored = clocked("matrix", lambda i=i, d=draws: dataset._matrices([i], d))
        clocked("target", lambda i=i, m=matrices, f=mirrored: dataset._targets([i], m, f))
        clocked("warp", lambda w=window, m=matrices: read_crop(w, m[0], dataset.size, origin))
    return {stage: total / count for stage, total in spent.items()}


def _whole(dataset: FaceDataset, batch: int = 16) -> float:
    began, count = time.process_time(), len(dataset)
    for start in range(0, count, batch):
        keys = [Draw(i, i) for i in range(start, min(start + batch, count))]
        torch.stack([crop for crop, _ in dataset.__getitems__(keys)])
    return 1e3 * (time.process_time() - began) / count


def print_rows(rows: list[dict]) -> None:
    print(f"{'cache':<8}{'workers':>8}{'faces/s':>10}{'goal':>8}{'to make it':>12}  ms a face")
    for row in rows:
        made = "" if row["cache_seconds"] is None else f"{row['cache_seconds']:.1f} s"
        parts = ", ".join(f"{stage} {spent:.2f}" for stage, spent in row["ms"].items())
        print(
            f"{row['cache']:<8}{row['workers']:>8}{row['faces_per_second']:>10.0f}"
            f"{row['goal']:>8}{made:>12}  {parts}"
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.faces", description=__doc__)
    parser.add_argument("--dataset", default="folder")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--faces", type=int, default=FACES, help="to write, without a data set")
    parser.add_argument(
        "--side", type=int, default=SIDE, help="of the photographs that are written"
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as scratch:
        if args.data_root is None:
            splits = write_photographs(Path(scratch) / "photos", args.faces, args.side)
        else:
            splits = open_faces(args.dataset, args.data_root, verify=False)
        folder = Path(scratch) / "cache"
        rows = measure(splits, args.size, args.batch_size, args.workers, args.seconds, folder)
    print_rows(rows)
    if args.out is not None:
        shared = {**records.environment("cpu"), "size": args.size, "side": args.side}
        jsonl.write(args.out, [{**shared, **row} for row in rows])
    return rows


if __name__ == "__main__":
    main()
