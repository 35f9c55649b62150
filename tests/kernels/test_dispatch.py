"""Who stands between a call and its operation sees it: modes, tracing, profilers, lazy negation."""

from __future__ import annotations

import pytest
import torch
from hubpath_fast.kernels import aggregate, combine, exploit_loss, noisy_topk
from support.output_cases import SMALL, Inputs, make
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
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
        combine(inputs.outputs, inputs.weights, inputs)
    assert NAME in names.seen


@pytest.mark.parametrize("pre_dispatch", [False, True], ids=["", "before dispatch"])
def test_a_trace_holds_the_operation(inputs, pre_dispatch):
    def double(x):
        return combine(x, inputs.weights, inputs) * 2

    traced = make_fx(double, pre_dispatch=pre_dispatch)(inputs.outputs)
    names = [node.target.name() for node in traced.graph.nodes if node.op == "call_function"]
    assert NAME in names
    assert torch.equal(traced(inputs.outputs + 1), double(inputs.outputs + 1))


def test_a_profiler_knows_its_name(inputs):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        combine(inputs.outputs, inputs.weights, inputs)
    assert NAME in {event.key for event in seen.key_averages()}


def test_a_view_that_negates_is_read_as_it_reads(inputs):
    negated = torch._neg_view(inputs.outputs)
    assert negated.is_neg()
    routing = (inputs.weights, inputs)
    assert torch.equal(combine(negated, *routing), combine(-inputs.outputs, *routing))
    rest = (inputs, inputs.target)
    assert torch.equal(exploit_loss(negated, *rest), exploit_loss(-inputs.outputs, *rest))


def test_no_forward_derivative_is_lost_in_silence(inputs):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs.outputs, inputs.outputs)
        with pytest.raises(NotImplementedError, match="jvp"):
            combine(dual, inputs.weights, inputs)


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_of_functions_sees_the_operation(inputs):
    with Functions() as functions:
        combine(inputs.outputs, inputs.weights, inputs)
    assert any("combine_forward" in name for name in functions.seen)


@pytest.mark.parametrize("name", ["exploit_loss", "noisy_topk"])
@pytest.mark.filterwarnings("ignore")  # torch.jit's, of its age
def test_torch_jit_records_the_operation(inputs, name):
    calls = {
        "exploit_loss": lambda x: exploit_loss(x, inputs, inputs.target),
        "noisy_topk": lambda x: noisy_topk(x, x, None, 2, False)[0],
    }
    x = inputs.outputs
    traced = torch.jit.trace(calls[name], (x,), check_trace=False)
    assert torch.equal(traced(x + 1), calls[name](x + 1))


def test_a_gradient_of_zeros_without_memory_is_one_of_zeros(inputs):
    outputs = inputs.outputs.clone().requires_grad_()
    combine(outputs, inputs.weights, inputs).sgn().sum().backward()
    assert torch.equal(outputs.grad, torch.zeros_like(outputs))


def test_a_parameter_that_negates_is_read_as_it_reads(inputs):
    matrix = nn.Parameter(torch._neg_view(inputs.matrix), requires_grad=False)
    assert matrix.is_neg()
    given = (inputs.outputs, inputs.weights, inputs)
    found = aggregate(*given, matrix, inputs.bias, grouped=True)
    assert torch.equal(found, aggregate(*given, -inputs.matrix, inputs.bias, grouped=True))


def test_tensors_without_memory_have_shapes(inputs):
    empty = Inputs(**{name: tensor.to("meta") for name, tensor in vars(inputs).items()})
    expected = combine(inputs.outputs, inputs.weights, inputs)
    assert combine(empty.outputs, empty.weights, empty).shape == expected.shape
