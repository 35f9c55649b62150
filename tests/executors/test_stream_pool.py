"""What a pool of streams asks of CUDA, in which order: its calls are recorded, none is made."""

import pytest
import torch
from support.graphs import assert_same, fixed_routing
from support.models import batch, build, conv_expert, train
from torch import nn

from hubpath_fast.executors import streams
from hubpath_fast.executors.sharing import Sharing
from hubpath_fast.executors.stream_pool import StreamPool
from hubpath_fast.executors.streams import NUM_STREAMS, StreamsExecutor

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def calls(cuda):
    return cuda.log


def test_streams_fork_mark_what_they_read_and_join(calls):
    pool = StreamPool(DEVICE, 3)
    with pool.forked([2, 0, 2], torch.zeros(1)):
        calls.append("inside")
        with pool.on(2):
            assert torch.cuda.current_stream().name == 2
        assert torch.cuda.current_stream().name == "caller"
    assert calls == [
        (0, "waits for", "caller"), (0, "reads"), (2, "waits for", "caller"), (2, "reads"),
        "inside", ("caller", "waits for", 0), ("caller", "waits for", 2),
    ]  # fmt: skip


def test_streams_are_joined_after_an_exception(calls):
    pool = StreamPool(DEVICE, 2)
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        pool.forked([1], torch.zeros(1)),
        pool.on(1),
    ):
        raise RuntimeError("out of luck")
    assert calls[-1] == ("caller", "waits for", 1)
    assert torch.cuda.current_stream().name == "caller"


def test_streams_train_like_sequential(calls):
    model = build(StreamsExecutor())
    assert_same(train(model, 5), train(build("sequential"), 5))
    used = {call[0] for call in calls if call[-1] == "reads"}
    assert used == set(range(NUM_STREAMS))
    calls.clear()
    model.eval()(batch()[0])
    assert calls[0] == (0, "waits for", "caller")
    assert calls[-1][:2] == ("caller", "waits for")


def test_experts_that_share_a_module_go_on_one_stream(calls, monkeypatch):
    model = build(StreamsExecutor())
    model.experts[2][0] = model.experts[0][0]
    used, call = {}, streams.call_expert

    def spy(experts, group, *others):
        used[group.index] = torch.cuda.current_stream().name
        return call(experts, group, *others)

    monkeypatch.setattr(streams, "call_expert", spy)
    model(batch()[0], routing=fixed_routing(model))
    assert used[0] == used[2]
    assert len({used[0], used[1], used[3]}) == 3
    model.experts[2][0] = conv_expert()[0]  # it no longer does
    model(batch()[0], routing=fixed_routing(model))
    assert len(set(used.values())) == 4


def test_sharing_finds_modules_parameters_and_buffers_and_what_is_tied_through_others():
    experts = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(6)]
    experts[1][0].weight = experts[0][0].weight
    experts[3][1].running_mean = experts[2][1].running_mean
    sharing = Sharing()
    assert sharing(experts) == [0, 0, 2, 2, 4, 5]
    assert sharing(experts) == [0, 0, 2, 2, 4, 5]
    experts[5][1], experts[5][0] = experts[1][1], experts[3][0]
    assert sharing(experts) == [0, 0, 0, 0, 4, 0]
    experts[5] = nn.Linear(2, 2)
    assert sharing(experts) == [0, 0, 2, 2, 4, 5]
    assert sharing(experts[2:]) == [0, 0, 2, 3]
