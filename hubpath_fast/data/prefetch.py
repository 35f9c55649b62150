"""Batches copied to a GPU while it computes: one more than are handed out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


class CudaCopier:
    """Copies batches from pinned memory on a stream of its own, while the GPU computes.

    Three things keep that sound. The current stream waits for the event of the very copy it uses,
    not for the stream, where the next copy is queued already. The copies' memory belongs to the
    copying stream, so it is marked as used by the current one (``record_stream``): freed early, it
    is not written again before that use is over. And PyTorch's allocator of pinned memory keeps a
    source that is dropped until its copy is done.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device)

    def start(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Queues the copy of a batch, and returns what ``finish`` takes."""
        with torch.cuda.stream(self._stream):
            copies = tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
        return copies, self._stream.record_event()

    def finish(self, copy: tuple[Batch, torch.cuda.Event]) -> Batch:
        """The batch on the device, ready for what is queued on the current stream from now on."""
        copies, done = copy
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for tensor in copies:
            tensor.record_stream(current)
        return copies


def prefetched(batches: Iterable[Batch], copier: CudaCopier) -> Iterator[Batch]:
    """The batches on the device, in order; a batch is queued before the one in front is handed out.

    An exception of ``batches`` is raised in its turn, when all batches before it were handed out.
    """
    source, waiting, failure = iter(batches), None, None
    while failure is None:
        try:
            batch = next(source)
        except StopIteration:
            break
        except Exception as error:
            failure = error
        else:
            started = copier.start(batch)
            if waiting is not None:
                yield copier.finish(waiting)
            waiting = started
    if waiting is not None:
        yield copier.finish(waiting)
    if failure is not None:
        raise failure
