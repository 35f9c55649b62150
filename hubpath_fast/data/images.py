"""Images as batches: the stateless training stream and evaluation in order.

Worker processes decode in advance, and images travel as bytes. Shapes: B images a batch, S
pixels a side.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..parallel.ranks import on_this_machine
from ..parallel.share import Share
from ..worker_failure import cut_off, forget_frames, not_started, worker_failure
from .layouts import DataError
from .order import Draw, Places, SampleOrder, shared_batches
from .prefetch import CudaCopier, prefetched
from .splits import Split

PREFETCH = 4  # batches that each worker decodes in advance: enough for a few slow images in a row
MAX_WORKERS = 12  # more than that and one process cannot collect the batches any faster
GRACE_SECONDS = 10  # that a worker lives after SIGTERM; see _set_signals


class ImageDataset(Dataset):
    """Decodes and transforms one image at a time.

    split: files or arrays. transform: PIL image -> uint8 [3, S, S]; it may draw from torch's
    generator.

    ``dataset[i]`` is (image, target), the target as the split has it. ``dataset[Draw(i, seed)]`` is
    the same with the transform's draws fixed by the seed, and torch's generator left as it was.
    """

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]):
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, Any]:
        if not isinstance(key, Draw):
            return self.transform(self.split.load(key)), self.split.targets[key]
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

    Args:
        batch_size: B.
        seed: any integer.
        workers: processes that decode, one thread each; 0: decode here; None:
            ``default_workers()``.
        device: where the batches go; for CUDA from pinned memory, on a stream of their own, while
            the batch before is computed on. None: they stay here.
        prefetch: batches that each worker decodes in advance.
        augment: (images, targets, step) -> (images, targets), applied to whole batches on the
            device, such as ``RandomCrops``. Of several ranks' batches it is also given ``Places``,
            those of the images in the batch, by which it must do as with the whole of it.
        share: of a batch what this process decodes and yields; by default all.
        pairs: ``augment`` mixes the first image of a batch with the last and so on, as ``Mixing``
            does: a rank decodes the partners of its own images as well, up to twice as many.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        seed: int = 0,
        workers: int | None = 0,
        device: torch.device | str | None = None,
        prefetch: int = PREFETCH,
        augment: Callable[..., tuple[Tensor, Tensor]] | None = None,
        share: Share = Share(),
        pairs: bool = False,
    ):
        self.order = SampleOrder(len(dataset), batch_size, seed)
        self.places = Places.of(share, batch_size, pairs)
        self.dataset, self.workers, self.device = dataset, _check_workers(workers), device
        self.prefetch, self.augment = _check_prefetch(prefetch), augment

    def batches(self, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of start_step, start_step + 1, ... without end.

        Each is images uint8 [B, 3, S, S] and targets [B, ...], of classes int64 [B]; of a share
        its own of these B.
        """
        draws = (self.order.draws(step, self.places) for step in count(start_step))
        loader = _loader(
            self.dataset, self.workers, self.device, self.prefetch, batch_sampler=draws
        )
        batches = _read(loader, self.device, _copier(self.device))
        for step, (images, targets) in enumerate(batches, start=start_step):
            if self.augment is not None:
                at = () if self.places is None else (self.places,)
                images, targets = self.augment(images, targets, step, *at)
            if self.places is not None:
                images, targets = self.places.own(images), self.places.own(targets)
            yield images, targets


class EvalBatches:
    """An ``ImageDataset`` in its own order, each image once; may be iterated any number of times.

    Yields images uint8 [<= B, ...] (of one image what the transform gives, as a rule [3, S, S]) and
    targets [<= B, ...]. Workers stay alive between passes. workers, device, prefetch: see
    ``TrainStream``. share: of each batch what this process decodes and yields; one without a sample
    of its own yields one image and no target, see ``shared_batches``.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int = 64,
        workers: int | None = 0,
        device: torch.device | str | None = None,
        prefetch: int = PREFETCH,
        share: Share = Share(),
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size}")
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        self._copier = _copier(device)  # kept between passes: a stream keeps memory for itself
        workers = _check_workers(workers)
        self._parts = shared_batches(len(dataset), batch_size, share)
        self._loader = _loader(
            dataset,
            workers,
            device,
            _check_prefetch(prefetch),
            batch_sampler=[part for part, _ in self._parts],
            persistent_workers=workers > 0,
        )

    @property
    def num_samples(self) -> int:
        return len(self.dataset)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = _read(self._loader, self.device, self._copier)
        for (images, targets), (_, counted) in zip(batches, self._parts, strict=True):
            yield images, targets[:counted]


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """The usable cores, of which ranks on one machine have their parts, one less for training
    itself; from 1 to 12."""
    return min(max(usable_cores() // on_this_machine() - 1, 1), MAX_WORKERS)


def _loader(dataset, workers: int, device, prefetch: int, **options) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=_is_cuda(device),
        worker_init_fn=_set_signals,
        # Its own generator: the loader's base seed must not be drawn from the run's random state.
        generator=torch.Generator(),
        **options,
    )


def _copier(device: torch.device | str | None) -> CudaCopier | None:
    return CudaCopier(device) if _is_cuda(device) else None


def _read(
    loader: DataLoader, device: torch.device | str | None, copier: CudaCopier | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches on the device, by the copier if there is one.

    Raises, in one sentence each: DataError of a broken image, WorkerFailure.
    """
    try:
        batches = _start(loader)
        if copier is not None:
            yield from prefetched(batches, copier)
            return
        for images, targets in batches:
            yield _move(images, device), _move(targets, device)
        return
    except Exception as error:
        failure = _data_error(error) or worker_failure(error)
        if failure is None and loader.num_workers:
            failure = cut_off(error)
        if failure is None:
            raise
        if failure is not error:
            forget_frames(error)
    try:
        raise failure
    finally:
        del failure  # else this frame and the error hold each other


def _start(loader: DataLoader) -> Iterator:
    before = set(multiprocessing.active_children())
    try:
        return iter(loader)
    except OSError as error:  # no memory, or too many processes
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
            child.join()
        _discard_half_made(error)
        raise not_started(error) from None


def _discard_half_made(error: OSError) -> None:
    """Of torch's iterator, whose ``__del__`` raises if it was not made to the end."""
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if hasattr(owner, "_shutdown"):
            owner._shutdown = True
        trace = trace.tb_next


def _data_error(error: Exception) -> DataError | None:
    """From a worker, the message has the worker's traceback before it."""
    if not isinstance(error, DataError):
        return None
    return DataError(str(error).rpartition("DataError: ")[2].strip())


def _set_signals(_: int, grace_seconds: int = GRACE_SECONDS) -> None:
    """Leaves signals that reach a whole process group to the main process, which saves first.

    Ctrl-C is ignored. SIGTERM may also be torch's or the operating system's way of ending a worker
    that the main process can no longer reach, so a worker obeys, but with time for the main process
    to save and end it; and then without an error, which torch would raise there in midst of a step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "alarm"):  # Windows, where no signal reaches a group of processes
        return
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(grace_seconds))


def _is_cuda(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _move(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    return tensor if device is None else tensor.to(device)


def _check_workers(workers: int | None) -> int:
    if workers is None:
        return default_workers()
    if workers < 0:
        raise ValueError(
            f"workers: expected an integer of at least 0, got {workers}; 0: decode here"
        )
    return workers


def _check_prefetch(prefetch: int) -> int:
    if prefetch < 1:
        raise ValueError(f"prefetch: expected an integer of at least 1, got {prefetch}")
    return prefetch
