"""A training step of a hub of hundreds of experts on a shelf's features, part by part.

    python -m bench.shelf_step [--experts 256] [--images 4000] [--features 512] [--classes 100]
        [--batch 256] [--k 2] [--router features|image] [--stride S] [--steps 200]
        [--aggregator auto] [--executor grouped|sequential] [--give-back]
        [--device cpu|cuda] [--host]

The shelf is made up, in a temporary folder, and read once before anything is timed, so that its
features are in the page cache. The parts are timed one after another in the same steps: medians,
and page faults, which tell memory that is handed back and asked for again. Then the trainer itself,
with its log and its checkpoints: its processor time is what an idle thread takes, about, where
other processes share the cores. What the process then holds beyond the page cache is the most that
it held, since it keeps what it frees.

On a GPU each part ends when the device is done, which makes the sum of the parts too large: the
last line but the trainer's is of steps in a row, with nobody waiting, and says how many bytes they
move for the heads and AdamW alone. ``--host`` leaves features on the host, as if they did not fit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

import hubpath_fast as hp
from hubpath_fast.devices import check_device, to_device
from hubpath_fast.executors.sequential import SequentialExecutor
from hubpath_fast.features import Shelf, write_shelf
from hubpath_fast.routing import Routing
from hubpath_fast.shelf.memory import keep_freed_memory
from hubpath_fast.shelf.placing import place
from hubpath_fast.shelf.run import build, shelf_task
from hubpath_fast.shelf.settings import ShelfFitSettings
from hubpath_fast.shelf.stream import ShelfStream
from hubpath_fast.training import PathwayObjective, Reporting, Trainer, build_optimizer
from hubpath_fast.training.optimizer import pathway_groups

WARM_UP, PIXELS = 5, 32
WATCHED = "watched"  # the model whose features the router looks at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--router", choices=("features", "image"), default="features")
    parser.add_argument("--stride", type=int, default=None, help="of the router on the image")
    parser.add_argument("--aggregator", default="auto")
    parser.add_argument("--executor", choices=("grouped", "sequential"), default="grouped")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--host", action="store_true", help="of a GPU: features stay on the host")
    parser.add_argument("--steps", type=int, default=200, help="of the trainer; 0: parts alone")
    parser.add_argument(
        "--give-back", action="store_true", help="freed memory, as the library does"
    )
    options = parser.parse_args()
    try:
        device = check_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "shelf"
        # In a process of its own: what it frees would be there for the steps to take.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(options, place))
        maker.start()
        maker.join()
        shelf = Shelf.open(place)
        read_all(shelf)
        if not options.give_back and device.type == "cpu":
            keep_freed_memory()
        settings = ShelfFitSettings(
            k=options.k,
            aggregator=options.aggregator,
            heads="new",
            generator_stride=options.stride,
            router="image" if options.router == "image" else f"features:{WATCHED}",
        )
        trainer = settings.trainer.replace(batch_size=options.batch, device=options.device)
        settings = settings.replace(trainer=trainer)
        for name, (seconds, busy, faults) in parts(shelf, settings, options).items():
            print(
                f"{name:<22} {1e3 * seconds:8.2f} ms ({1e3 * busy:.2f} ms of processor time), "
                f"{faults:.0f} page faults"
            )
        if options.steps:
            whole(shelf, settings, options, Path(folder) / "hub")


def make(options: argparse.Namespace, folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    n, d = options.images, options.features
    names = [WATCHED, *(f"model{i:03d}" for i in range(options.experts))]
    features = {name: torch.randn(n, d, generator=draw).half() for name in names}
    targets = torch.randint(options.classes, (n,), generator=draw)
    sizes = {"train": n * 8 // 10, "validation": n - n * 8 // 10}
    pixels = torch.randint(256, (n, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=draw)
    classes = [f"class {c}" for c in range(options.classes)]
    write_shelf(folder, features, targets, classes, sizes, pixels)


def read_all(shelf: Shelf) -> None:
    for i in range(len(shelf.models)):
        shelf.features(i).sum(dtype=torch.float32)


def model_of(shelf: Shelf, settings: ShelfFitSettings, options: argparse.Namespace):
    torch.manual_seed(0)
    model = build(shelf, range(1, len(shelf.models)), settings)
    torch.nn.init.normal_(model.generator.clean.weight, std=0.01)  # routes spread from the start
    if options.executor == "sequential":
        model.executor = SequentialExecutor()
    if options.device != "cpu":
        free = 0 if options.host else None
        print(place(model.to(options.device), options.device, free).text())
    return model


def parts(
    shelf: Shelf, settings: ShelfFitSettings, options: argparse.Namespace
) -> dict[str, tuple[float, float, float]]:
    """(seconds, those of the processor, page faults) of each part of a step, medians over steps."""
    model = model_of(shelf, settings, options).train()
    optimizer = build_optimizer(model, pathway_groups(model, settings.trainer), settings.trainer)
    criterion = hp.HubPathwayLoss(explore=settings.explore)
    found: dict[str, list[tuple[float, float, int]]] = {}
    device = torch.device(options.device)
    watch = Stopwatch(device)

    def timed(name: str, function: Callable):
        before = watch.now()
        result = function()
        passed = tuple(b - a for a, b in zip(before, watch.now(), strict=True))
        found.setdefault(name, []).append(passed)
        return result

    def step(x, y, timed=timed) -> Routing:
        timed("zero_grad", lambda: optimizer.zero_grad(set_to_none=True))
        routing = timed("router", lambda: model.route(x))
        outputs = timed("gather and products", lambda: model._outputs(x, routing))

        def losses():
            prediction = model._aggregate(outputs, routing)
            return criterion(hp.PathwayOutput(prediction, outputs, routing), y).total

        total = timed("aggregation, losses", losses)
        timed("backward", total.backward)
        timed("AdamW", optimizer.step)
        return routing

    stream = ShelfStream(shelf, options.batch, 0).batches()
    with model.executor.updating(model.experts, optimizer):
        for _ in range(WARM_UP + 20):
            batch = to_device(next(stream), device)
            routing = timed("all parts", lambda batch=batch: step(*batch))
        print(f"{sum(n > 0 for n in routing.counts())} of {len(model.experts)} experts have rows")
        if device.type != "cpu":
            in_a_row(lambda: step(*to_device(next(stream), device), untimed), model, watch)
    return {
        name: tuple(statistics.median(column) for column in zip(*each[WARM_UP:], strict=True))
        for name, each in found.items()
    }


def untimed(name: str, function: Callable):
    return function()


def in_a_row(step: Callable, model: hp.HubPathway, watch: Stopwatch, steps: int = 50) -> None:
    """Times steps that nobody waits for."""
    step()
    seconds, busy, _ = watch.now()
    for _ in range(steps):
        step()
    given = time.perf_counter()  # all is launched
    end, busy_end, _ = watch.now()
    # Heads are read, their gradient is written; AdamW reads four tensors and writes three.
    moved = 9 * sum(p.nbytes for p in model.experts.parameters())
    print(
        f"{steps} steps in a row: {1e3 * (end - seconds) / steps:.3f} ms a step, "
        f"{1e3 * (given - seconds) / steps:.3f} ms until they are launched, "
        f"{1e3 * (busy_end - busy) / steps:.3f} ms of processor time; {moved / 1e6:.0f} MB of "
        f"heads, gradients and moments each, {moved * steps / (end - seconds) / 1e12:.2f} TB/s"
    )


def whole(shelf: Shelf, settings: ShelfFitSettings, options: argparse.Namespace, out: Path) -> None:
    """The trainer as `hubpath shelf fit` runs it."""
    config = settings.trainer.replace(steps=options.steps)
    task = shelf_task(shelf, settings)
    model = model_of(shelf, settings, options)
    reporting = Reporting(Console(quiet=True), expert_names=model.origin.labels)
    stream = ShelfStream(shelf, options.batch, 0)
    objective = PathwayObjective(task.criterion(settings.explore))
    trainer = Trainer(model, objective, stream, config, out, task=task, reporting=reporting)
    start, busy = time.perf_counter(), time.process_time()
    trainer.fit()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    print(
        f"trainer: {options.steps} steps in {seconds:.1f} s ({busy:.1f} s of processor time), "
        f"{1e3 * seconds / options.steps:.1f} ms a step ({1e3 * busy / options.steps:.1f} ms), "
        f"with the log and {-(-options.steps // config.save_every)} checkpoints"
    )
    anonymous = memory("RssAnon")
    if anonymous:
        print(f"memory beyond the page cache: {anonymous / 1e9:.2f} GB")


class Stopwatch:
    """Of a device, which is waited for."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> tuple[float, float, int]:
        """Seconds, those of the processor, page faults."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return time.perf_counter(), time.process_time(), faults


def memory(name: str) -> int:
    """Bytes, of Linux; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main()
