"""What tests of benchmarks share."""

from __future__ import annotations

import contextlib
import time
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


class FakeStream:
    """Stands, with those below, for CUDA's streams, graphs and events: a replay does nothing."""

    def wait_stream(self, other):
        pass


class FakeGraph:
    def replay(self):
        pass


class FakeEvent:
    def __init__(self, enable_timing):
        pass

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.time - self.time) * 1e3


@pytest.fixture
def cuda(monkeypatch):
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
