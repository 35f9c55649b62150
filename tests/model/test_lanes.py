"""What lanes and captures ask of CUDA, in which order: its calls are recorded, none is made."""

import contextlib

import pytest
import torch
from test_executors import batch, build, train

from hubpath_fast.model import pathway
from hubpath_fast.model.executors.backend import CudaBackend
from hubpath_fast.model.executors.lanes import Lanes
from hubpath_fast.model.executors.streams import NUM_STREAMS, StreamsExecutor

DEVICE = torch.device("cuda", 0)


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))


@pytest.fixture
def calls(monkeypatch):
    """The log of calls. Streams are called 0, 1, ... and the caller's "caller"."""
    log, made = [], []
    now = [FakeStream("caller", log)]

    def stream(device=None):
        made.append(FakeStream(len(made), log))
        return made[-1]

    @contextlib.contextmanager
    def current(stream):
        now.append(stream)
        try:
            yield
        finally:
            now.pop()

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        log.append(("capture", pool, stream.name, capture_error_mode))
        yield

    class Graph:
        def replay(self):
            log.append("replay")

    def mode(value):
        log.append(("sync debug", value))

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _, stream: log.append((stream.name, "reads"))
    )
    return log


def test_lanes_fork_mark_what_they_read_and_join(calls):
    lanes = Lanes(DEVICE, 3)
    with lanes.forked([2, 0, 2], torch.zeros(1)):
        calls.append("inside")
        with lanes.lane(2):
            assert torch.cuda.current_stream().name == 2
        assert torch.cuda.current_stream().name == "caller"
    assert calls == [
        (0, "waits for", "caller"), (0, "reads"), (2, "waits for", "caller"), (2, "reads"),
        "inside", ("caller", "waits for", 0), ("caller", "waits for", 2),
    ]  # fmt: skip


def test_lanes_are_joined_after_an_exception(calls):
    lanes = Lanes(DEVICE, 2)
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        lanes.forked([1], torch.zeros(1)),
        lanes.lane(1),
    ):
        raise RuntimeError("out of luck")
    assert calls[-1] == ("caller", "waits for", 1)
    assert torch.cuda.current_stream().name == "caller"


def test_a_capture_is_on_the_current_lane(calls):
    backend = CudaBackend(DEVICE)
    with backend.forked([5], torch.zeros(1)), backend.lane(5):
        replay = backend.capture(lambda: calls.append("work"), "pool")
    assert calls[2:4] == [("capture", "pool", 5, "thread_local"), "work"]
    replay()
    assert calls[-1] == "replay"


def test_what_waits_for_the_device_is_found_before_a_capture(calls):
    backend = CudaBackend(DEVICE)
    backend.warm_up(lambda: calls.append("run"))
    assert calls == ["run", "run", ("sync debug", "error"), "run", ("sync debug", 1)]

    def waits():
        if ("sync debug", "error") in calls[5:]:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        backend.warm_up(waits)
    assert calls[-1] == ("sync debug", 1)


def test_streams_train_like_sequential(calls, monkeypatch):
    monkeypatch.setattr(pathway, "choose", lambda asked, device, num_experts: (asked, ()))
    expected = train(build("sequential"), 5)
    model = build("streams")
    for name, value in train(model, 5).items():
        assert torch.equal(value, expected[name]), name
    assert isinstance(model._running, StreamsExecutor)
    used = {call[0] for call in calls if call[-1] == "reads"}
    assert used == set(range(NUM_STREAMS))
    calls.clear()
    model.eval()(batch()[0])
    assert calls[0] == (0, "waits for", "caller")
    assert calls[-1][:2] == ("caller", "waits for")
