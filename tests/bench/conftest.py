"""What tests of benchmarks share."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

# Triton decides where it is imported whether it interprets, and tests here unset TRITON_INTERPRET:
# whichever of them imports it first must not decide for all.
import hubpath_fast.kernels  # noqa: F401
import pytest
import torch


@pytest.fixture
def tf32():
    """TF32 is on for products, too, as a user may have it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


TICK = 2.0**-9  # a power of two: sums are exact


class FakeStream:
    """Stands, with those below, for CUDA's streams, graphs and events: a replay does nothing, and
    is recorded to take ``TICK`` seconds."""

    def wait_stream(self, other):
        pass


class FakeGraph:
    def replay(self):
        pass


class FakeEvent:
    ticks = itertools.count()

    def __init__(self, enable_timing):
        pass

    def record(self):
        self.time = next(self.ticks)

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.time - self.time) * TICK * 1e3


class Clock:
    """Stands still unless something that ``takes`` seconds is called."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def call():
            self.now += seconds

        return call


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cuda(monkeypatch):
    """The seconds that a replay is recorded to take."""

    @contextlib.contextmanager
    def within(*_, **__):
        yield

    names = {"Stream": FakeStream, "CUDAGraph": FakeGraph, "Event": FakeEvent, "stream": within,
             "graph": within, "synchronize": lambda *_: None, "current_stream": FakeStream,
             "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=64)}  # fmt: skip
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **(k | {"device": "cpu"})))
    return TICK
