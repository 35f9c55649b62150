"""A stand-in for what captures touch of CUDA and of torch 2.8 to 2.11; nothing is launched.

It models what went wrong there: a capture that fails leaves the random generator capturing and the
allocator recording, and waiting for a stream that does not take part in a capture ends it. The
second is how nodes that accumulate a parameter's gradient do harm: each belongs to the stream it
was made on, for as long as anything keeps it alive.
"""

import contextlib
from collections import Counter

import torch

from hubpath_fast.executors.autograd_graph import accumulators_of
from hubpath_fast.executors.graphs.backend import CudaBackend
from support.graphs import run_again


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))


class FakeCuda:
    """Streams are called 0, 1, ... and the caller's "caller". log: what was called, in order.

    generator_captures: whether torch's generator takes a capture to be under way, in which case a
    draw raises. recording: the pools that the allocator takes to be recorded; pinned: those that
    the allocator of pinned memory does, which cannot be told otherwise. uses: of pools.
    broken: whether the next capture is broken off by CUDA; every: all that follow, too. dangling:
    whether a graph was freed that an allocator still asks.
    """

    def __init__(self, monkeypatch):
        self.log, self.recording, self.pinned, self.uses = [], set(), {}, Counter()
        self.generator_captures, self.broken, self.every = False, False, False
        self.dangling = False
        self.capturing_on = None
        self._streams, self._now = 0, [FakeStream("caller", self.log)]
        cuda = {
            "Stream": self._stream,
            "current_stream": lambda device=None: self._now[-1],
            "stream": self._on,
            "CUDAGraph": lambda: FakeGraph(self),
            "graph_pool_handle": object,
            "get_sync_debug_mode": lambda: 1,
            "set_sync_debug_mode": lambda mode: self.log.append(("sync debug", mode)),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: self.log.append("empty cache"),
            "memory_snapshot": lambda pool: [{"total_size": 100 * self.uses[pool]}],
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        internals = {
            "_cuda_endAllocateToPool": self._end_recording,
            "_cuda_releasePool": self._release,
        }
        for name, value in internals.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda _, s: self.log.append((s.name, "reads"))
        )
        differentiate = torch.autograd.grad
        monkeypatch.setattr(
            torch.autograd, "grad", lambda *a, **k: self._differentiate(differentiate, *a, **k)
        )

    @property
    def stream(self):
        return self._now[-1].name

    def draw(self):
        """A random number on the device, outside of any capture."""
        if self.generator_captures:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def is_clean(self):
        clean = not self.generator_captures and not self.recording and not self.dangling
        return clean and self.capturing_on is None

    def made_here(self, output):
        """The nodes that accumulate gradients of ``output``'s leaves were made on this stream,
        those that were not there before."""
        for node in accumulators_of(output):
            node.metadata.setdefault("stream", self.stream)

    def _stream(self, device=None):
        self._streams += 1
        return FakeStream(self._streams - 1, self.log)

    @contextlib.contextmanager
    def _on(self, stream):
        self._now.append(stream)
        try:
            yield
        finally:
            self._now.pop()

    def _end_recording(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def _release(self, device, pool):
        assert self.uses[pool] > 0, "a pool is released that nobody uses"
        self.uses[pool] -= 1

    def _differentiate(self, differentiate, outputs, *args, **kwargs):
        if self.capturing_on is not None:
            several = outputs if isinstance(outputs, tuple) else (outputs,)
            for node in accumulators_of(*several):
                if node.metadata.get("stream", self.stream) != self.capturing_on:
                    self.broken = True
                    raise RuntimeError("operation would make a stream depend on a capturing one")
        return differentiate(outputs, *args, **kwargs)


class FakeGraph:
    """A capture's states, as torch 2.11 leaves them."""

    def __init__(self, cuda):
        self.cuda, self.pool, self.ended = cuda, None, False

    def capture_begin(self, pool=None, capture_error_mode="global"):
        cuda, self.pool = self.cuda, pool if pool is not None else object()
        cuda.log.append(("capture", cuda.stream, capture_error_mode))
        cuda.generator_captures = True
        if self.pool in cuda.pinned:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        cuda.recording.add(self.pool)
        cuda.pinned[self.pool] = id(self)
        cuda.uses[self.pool] += 1
        cuda.capturing_on = cuda.stream

    def capture_end(self):
        cuda = self.cuda
        assert cuda.stream == cuda.capturing_on, "a capture must end where it began"
        cuda.capturing_on = None
        if cuda.broken or cuda.every:
            cuda.broken = False
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        cuda.recording.remove(self.pool)
        del cuda.pinned[self.pool]
        cuda.generator_captures, self.ended = False, True

    def reset(self):
        if self.ended:
            self.cuda._release(None, self.pool)
            self.ended = False

    def __del__(self):
        self.reset()
        if self.cuda.pinned.get(self.pool) == id(self):
            self.cuda.dangling = True

    def replay(self):
        self.cuda.log.append(("replay", self.cuda.stream))


class FakeCudaBackend(CudaBackend):
    """The real one, whose replays run what was captured again."""

    def capture(self, function, pool):
        results = []

        def run():
            results[:] = function()
            return results

        recorded = super().capture(run, pool)
        first = list(results)

        def replay():
            recorded()
            run_again(function, first)

        return replay

    def borrow(self, tensor):
        return tensor

    def budget(self):
        return 10**9
