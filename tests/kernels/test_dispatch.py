"""Who stands between a call and its operation sees it: modes, tracing, profilers, lazy negation."""

from __future__ import annotations

import pytest
import torch
from hubpath_fast.kernels import combine, exploit_loss
from output_cases import SMALL, make
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "hubpath_fast::combine_forward"


@pytest.fixture
def inputs(device):
    return make(SMALL, torch.float32, device)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operation(inputs):
    with Names() as names:
        combine(inputs.outputs, inputs.weights, *inputs.routing)
    assert NAME in names.seen


def test_a_trace_holds_the_operation(inputs):
    graph = make_fx(lambda x: combine(x, inputs.weights, *inputs.routing))(inputs.outputs).graph
    assert NAME in [node.target.name() for node in graph.nodes if node.op == "call_function"]


def test_a_profiler_knows_its_name(inputs):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        combine(inputs.outputs, inputs.weights, *inputs.routing)
    assert NAME in {event.key for event in seen.key_averages()}


def test_a_view_that_negates_is_read_as_it_reads(inputs):
    negated = torch._neg_view(inputs.outputs)
    assert negated.is_neg()
    routing = (inputs.weights, *inputs.routing)
    assert torch.equal(combine(negated, *routing), combine(-inputs.outputs, *routing))
    rest = (inputs.rows, inputs.target, SMALL.k)
    assert torch.equal(exploit_loss(negated, *rest), exploit_loss(-inputs.outputs, *rest))


def test_no_forward_derivative_is_lost_in_silence(inputs):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs.outputs, inputs.outputs)
        with pytest.raises(NotImplementedError, match="jvp"):
            combine(dual, inputs.weights, *inputs.routing)
