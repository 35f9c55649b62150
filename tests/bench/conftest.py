"""What tests of benchmarks share."""

from __future__ import annotations

from unittest.mock import MagicMock

# Triton decides where it is imported whether it interprets, and tests here unset TRITON_INTERPRET:
# whichever of them imports it first must not decide for all.
import hubpath_fast.kernels  # noqa: F401
import pytest
import torch
from support.bench import Lanes, Written, graphs_for_cpu

from bench import timing
from bench.children import Files, Writer


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    """The tests run under Triton's interpreter, which benchmarks refuse; kernels have been made."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def interpreted(monkeypatch, device):
    """For tests that run kernels: without a GPU they are interpreted after all."""
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def write():
    return Written()


@pytest.fixture
def writer(tmp_path):
    """Of a group's lines, to a file."""
    return Writer(Files(tmp_path, "part"), "group", lambda: {"device": "d"})


@pytest.fixture
def tf32():
    """Whether TF32 is on, of convolutions and products: it is, as a user may have it, before and
    after what checks do."""
    owners = torch.backends.cudnn, torch.backends.cuda.matmul
    owners[1].allow_tf32 = True
    yield lambda: tuple(owner.allow_tf32 for owner in owners)
    assert [owner.allow_tf32 for owner in owners] == [True, True]
    owners[1].allow_tf32 = False


@pytest.fixture
def quick(monkeypatch):
    """As few rounds as there must be, however many seconds."""
    interleaved = timing.interleaved

    def least(functions, device="cpu", seconds=2.0, *rest, **options):
        return interleaved(functions, device, 0.0, *rest, **options)

    monkeypatch.setattr(timing, "interleaved", least)


@pytest.fixture
def lanes(monkeypatch):
    """The numbers of lanes that graphs were asked to run on; they are stand-ins."""
    graphs_for_cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, inputs: module)
    return Lanes.asked


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
    """Stand-ins for CUDA's streams, graphs and events: a replay does nothing, and is recorded to
    take so many seconds, a power of two."""
    fake, seconds = MagicMock(), 2.0**-9
    fake.Event().elapsed_time.return_value = 1e3 * seconds
    fake.get_device_properties().L2_cache_size = 64
    for name in ("Stream", "CUDAGraph", "Event", "stream", "graph", "synchronize",
                 "current_stream", "get_device_properties"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **(k | {"device": "cpu"})))
    return seconds
