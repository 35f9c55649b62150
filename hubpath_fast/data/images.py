"""Image files as batches: the stateless training stream and evaluation in order.

Shapes: B images a batch, S pixels a side.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .folder import ImageSplit, load_image
from .layouts import DataError
from .order import Draw, SampleOrder


class ImageDataset(Dataset):
    """Decodes and transforms one image at a time.

    split: the files. transform: PIL image -> uint8 [3, S, S]; it may draw from torch's generator.

    ``dataset[i]`` is (image, target). ``dataset[Draw(i, seed)]`` is the same with the transform's
    draws fixed by the seed, and torch's generator left as it was.
    """

    def __init__(self, split: ImageSplit, transform: Callable[[Image.Image], Tensor]):
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, int]:
        if not isinstance(key, Draw):
            return self.transform(load_image(self.split.paths[key])), self.split.targets[key]
        state = torch.get_rng_state()
        # Not torch.manual_seed, which would reseed the GPUs of a run without workers too.
        torch.default_generator.manual_seed(key.seed)
        try:
            return self[key.index]
        finally:
            torch.set_rng_state(state)


class TrainStream:
    """Endless, stateless training batches of an ``ImageDataset``.

    The batch of step s is a function of (seed, s) alone: its samples by ``SampleOrder``, the
    augmentation of each by a seed from (seed, epoch, index). So it does not depend on the number of
    workers, and a resumed run goes on with what an uninterrupted one would have seen.

    batch_size: B. seed: any integer. workers: processes that decode ahead, one thread each; 0:
    decode here. device: where the batches go; for CUDA through pinned memory. None: they stay here.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str | None = None,
    ):
        self.order = SampleOrder(len(dataset), batch_size, seed)
        self.dataset, self.workers, self.device = dataset, _check_workers(workers), device

    @property
    def batch_size(self) -> int:
        return self.order.batch_size

    @property
    def num_samples(self) -> int:
        return self.order.num_samples

    def batches(self, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of start_step, start_step + 1, ... without end.

        Each is images uint8 [B, 3, S, S] and targets int64 [B].
        """
        steps = _Steps(self.order, start_step)
        loader = _loader(self.dataset, self.workers, self.device, batch_sampler=steps)
        return _read(loader, self.device)


class EvalBatches:
    """An ``ImageDataset`` in its own order, each image once; may be iterated any number of times.

    Yields images uint8 [<= B, 3, S, S] and targets int64 [<= B]. Workers stay alive between passes.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int = 64,
        workers: int = 0,
        device: torch.device | str | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        self._loader = _loader(
            dataset,
            _check_workers(workers),
            device,
            batch_size=batch_size,
            persistent_workers=workers > 0,
        )

    @property
    def num_samples(self) -> int:
        return len(self.dataset)

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return _read(self._loader, self.device)


class _Steps:
    """A batch sampler without end: what to decode for each step from ``start`` on."""

    def __init__(self, order: SampleOrder, start: int):
        self.order, self.start = order, start

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start
        while True:
            yield self.order.draws(step)
            step += 1


def _loader(dataset, workers: int, device, **options) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=_is_cuda(device),
        worker_init_fn=_set_signals,
        # Its own generator: the loader's base seed must not be drawn from the run's random state.
        generator=torch.Generator(),
        **options,
    )


def _read(loader: DataLoader, device: torch.device | str | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches on the device; a broken image as a DataError of one sentence."""
    try:
        for images, targets in loader:
            yield _move(images, device), _move(targets, device)
        return
    except DataError as error:
        # From a worker, the message has the worker's traceback before it.
        message = str(error).rpartition("DataError: ")[2].strip()
        # Its frames hold the loader in a cycle; ended by the collector, workers take 5 s each.
        error.__traceback__ = None
    raise DataError(message)


def _set_signals(_: int) -> None:
    """Leaves Ctrl-C, which reaches a whole process group, to the main process, which saves first.

    SIGTERM gets its default back, where the main process had a handler when it forked: it is
    torch's way of ending a worker that it can no longer reach.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_cuda(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _move(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    return tensor if device is None else tensor.to(device, non_blocking=_is_cuda(device))


def _check_workers(workers: int) -> int:
    if workers < 0:
        raise ValueError(f"workers is {workers}, but must be 0 (decode in this process) or more")
    return workers
