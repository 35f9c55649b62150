"""What captures ask of CUDA, and how they end: on a stand-in that fails as torch 2.8 to 2.11 do."""

import gc
import weakref
from functools import partial

import pytest
import torch
from support.fake_cuda import FakeCudaBackend
from support.graphs import (
    SIZES_AROUND_SIX,
    FakeBackend,
    exact_expert,
    fixed_routing,
    row_wise_expert,
)
from support.models import M, batch
from torch.autograd.graph import get_gradient_edge

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN
from hubpath_fast.executors.graphs import executor as graphs
from hubpath_fast.executors.graphs.backend import BrokenCaptureError, CudaBackend
from hubpath_fast.executors.graphs.capture import CapturedModule, Pool

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def make(make, monkeypatch, cuda):
    """make(expert) -> a model whose experts run as graphs on the stand-in for CUDA."""
    call = graphs.call_expert

    def call_expert(*arguments):
        output = call(*arguments)
        if output.requires_grad:
            cuda.made_here(output)
        return output

    monkeypatch.setattr(graphs, "call_expert", call_expert)

    return partial(make, backend=FakeCudaBackend)


def train(model, steps=1, counts=None):
    """Some steps, each of which finds the loss of the one before kept, as in a loop; the last."""
    x, y = batch()
    for _ in range(steps):
        loss = hp.HubPathwayLoss()(model(x, routing=fixed_routing(model, counts=counts)), y).total
        loss.backward()
    return loss


def captured(backend, function, stream=5, pool="pool"):
    with backend.forked([stream], torch.zeros(1)), backend.on(stream):
        return backend.capture(function, pool)


def test_a_capture_is_on_the_current_stream(cuda):
    backend = CudaBackend(DEVICE)
    replay = captured(backend, lambda: cuda.log.append("work"))
    assert cuda.log[2:4] == [("capture", 5, "thread_local"), "work"]
    assert cuda.is_clean()
    replay()
    assert cuda.log[-1] == ("replay", "caller")


def breaks(cuda):
    """Does what CUDA does not allow in a capture."""
    cuda.broken = True
    raise RuntimeError("operation not permitted when stream is capturing")


def silently_breaks(cuda):
    cuda.broken = True


def refuses(cuda):
    raise TypeError("gives a dict, not a tensor")


@pytest.mark.parametrize("fault", [breaks, silently_breaks, refuses])
def test_a_failed_capture_leaves_generator_and_pools_as_they_were(cuda, fault):
    backend = CudaBackend(DEVICE)
    captured(backend, lambda: None)
    uses = cuda.uses["pool"]
    with pytest.raises((RuntimeError, TypeError)):
        captured(backend, lambda: fault(cuda))
    assert cuda.is_clean()
    assert cuda.uses["pool"] == uses
    assert cuda.stream == "caller"
    cuda.draw()
    captured(backend, lambda: None, pool="another")
    gc.collect()
    assert cuda.is_clean()


def test_what_cannot_be_cleaned_up_is_said_with_a_remedy(cuda):
    cuda.every = True
    with pytest.raises(BrokenCaptureError, match=r"not permitted.*last checkpoint.*sequential"):
        captured(CudaBackend(DEVICE), lambda: breaks(cuda))


def test_what_waits_for_the_device_is_found_before_a_capture(cuda):
    backend = CudaBackend(DEVICE)
    backend.warm_up(lambda: cuda.log.append("run"))
    strict = [("sync debug", "error"), "run", ("sync debug", 1)]
    assert cuda.log == ["run", "run", *strict, "empty cache"]

    def waits():
        if ("sync debug", "error") in cuda.log[6:]:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        backend.warm_up(waits)
    assert cuda.log[-1] == ("sync debug", 1)


def test_accumulators_that_live_on_another_stream_do_not_end_a_capture(make, cuda):
    model = make(row_wise_expert)
    kept = []  # as DistributedDataParallel keeps them, made on the caller's stream
    for parameter in model.experts.parameters():
        kept.append(get_gradient_edge(parameter).node)
        kept[-1].metadata["stream"] = "caller"
    train(model, MIN_SEEN + 1)
    report = model.executor_report()
    assert (report.notes, report.eager) == ((), {})
    assert report.captured == dict.fromkeys(range(M), SIZES_AROUND_SIX)
    assert report.hits == 2 * M


@pytest.mark.parametrize("one_random_state", [True, False])
def test_a_loss_that_the_loop_keeps_does_not_end_a_capture(make, one_random_state):
    model = make(exact_expert)  # with dropout
    train(model)
    model.executor._backend.one_random_state = one_random_state
    train(model, MIN_SEEN)
    # Sizes that run eagerly before they are captured.
    assert train(model, MIN_SEEN, [9, 5, 5, 5]).isfinite()
    report = model.executor_report()
    assert report.eager == {}
    assert report.captured == {0: [6, 9], 1: [5, 6], 2: [5, 6], 3: [5, 6]}


def streams_of(cuda):
    """Of captures and of replays since: the streams, in order."""
    log = [entry for entry in cuda.log if isinstance(entry, tuple)]
    return (
        [entry[1] for entry in log if entry[0] == "capture"],
        [entry[1] for entry in log if entry[0] == "replay"],
    )


@pytest.mark.parametrize(
    ("one_random_state", "expected"), [(True, [0, 0, 0, 0]), (False, [0, 1, 2, 3])]
)
def test_each_expert_replays_on_the_stream_that_it_was_captured_on(
    make, cuda, one_random_state, expected
):
    model = make(exact_expert)
    for expert in model.experts[::2]:
        expert[3].p = 0.0  # of dropout: the others draw random numbers
    train(model)
    model.executor._backend.one_random_state = one_random_state
    train(model, MIN_SEEN - 2)
    cuda.log.clear()
    train(model)
    captures, _ = streams_of(cuda)
    assert captures == [stream for stream in expected for _ in "fb"]  # forward and backward
    cuda.log.clear()
    train(model)
    captures, replays = streams_of(cuda)
    assert captures == []
    assert replays[:M] == expected
    notes = model.executor_report().notes
    shared = "all experts share a stream, since random numbers are drawn by experts[1], experts[3]"
    assert [note for note in notes if note.startswith(shared)] == list(notes)
    assert len(notes) == one_random_state


def test_experts_that_share_a_module_share_a_stream(make, cuda):
    model = make(row_wise_expert)
    model.experts[3][0] = model.experts[1][0]
    train(model, MIN_SEEN)
    cuda.log.clear()
    train(model)
    assert streams_of(cuda)[1][:M] == [0, 1, 2, 1]


def test_nothing_is_collected_while_an_expert_is_captured(make, monkeypatch):
    enabled = []
    body = FakeCudaBackend.capture

    def capture(self, *arguments):
        enabled.append(gc.isenabled())
        return body(self, *arguments)

    monkeypatch.setattr(FakeCudaBackend, "capture", capture)
    model = make(row_wise_expert)
    train(model, MIN_SEEN)
    assert enabled == [False] * 2 * len(SIZES_AROUND_SIX) * M
    assert gc.isenabled()


def test_a_capture_that_cuda_breaks_off_costs_one_expert_one_try(make, cuda):
    model = make(row_wise_expert)
    train(model, MIN_SEEN - 1)
    cuda.broken = True  # the first capture
    train(model)
    assert cuda.is_clean()
    cuda.draw()
    report = model.executor_report()
    assert report.captured == dict.fromkeys(range(1, M), SIZES_AROUND_SIX)
    assert "it is tried once more" in report.notes[0]
    train(model, 2 * MIN_SEEN)
    assert model.executor_report().captured == dict.fromkeys(range(M), SIZES_AROUND_SIX)


class ForgetfulBackend(FakeBackend):
    """Keeps as little of what it captures as a graph does: no tensor of another pool."""

    def capture(self, function, pool):
        function()
        return lambda: None


def test_memory_that_a_graph_reads_lives_as_long_as_the_graph():
    """Weights may move between a forward and its backward, which is captured: to the host, or where
    an average of them is swapped in."""
    expert = row_wise_expert()
    expert.register_buffer("table", torch.zeros(3))
    expert.mask = torch.zeros(3)
    expert[3].weight.requires_grad_(False)
    memory = []  # dies with the last tensor on it

    def on_memory(tensor):
        array = tensor.detach().numpy().copy()
        memory.append(weakref.ref(array))
        return torch.from_numpy(array)

    for tensor in (*expert.parameters(), expert.table):
        tensor.data = on_memory(tensor)
    expert.mask = on_memory(expert.mask)
    x, _ = batch()
    graph = CapturedModule(expert, x, x.clone(), Pool(object()), ForgetfulBackend(DEVICE))
    for tensor in (*expert.parameters(), expert.table):
        tensor.data = torch.zeros_like(tensor)
    expert.mask = torch.zeros(3)
    gc.collect()
    assert len(memory) == 8
    assert all(ref() is not None for ref in memory)
    del graph
    gc.collect()
    assert all(ref() is None for ref in memory)
