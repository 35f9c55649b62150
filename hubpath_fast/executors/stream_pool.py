"""A few fixed CUDA streams that fork from the current one and join it again.

Memory: PyTorch's allocator hands a freed block to whoever allocates next on the stream it was
allocated on. Three things make that safe here. What these read belongs to the caller's stream,
so it is marked (``record_stream``). The caller's stream reads the outputs, which belong to
these, but they allocate nothing before they have waited for it again: forward at the fork,
backward for the gradient of the outputs. Autograd runs each backward operation on the stream of its
forward one, and waits where they meet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class StreamPool:
    """``count`` streams of a device. Each costs a workspace for matrix products (32 MiB on Hopper),
    and torch hands out 32 streams in turns: few, and kept."""

    def __init__(self, device: torch.device, count: int):
        self.device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]

    @contextlib.contextmanager
    def forked(self, streams: Iterable[int], reads: Tensor) -> Iterator[None]:
        """Within, these streams may be used, and read the tensor; after it they are joined.

        After an exception too: what they were given may be freed then.
        """
        current = torch.cuda.current_stream(self.device)
        forked = [self._streams[index] for index in sorted(set(streams))]
        for stream in forked:
            stream.wait_stream(current)
            reads.record_stream(stream)
        try:
            yield
        finally:
            for stream in forked:
                current.wait_stream(stream)

    def on(self, index: int) -> torch.cuda.StreamContext:
        """Makes this stream the current one."""
        return torch.cuda.stream(self._streams[index])
