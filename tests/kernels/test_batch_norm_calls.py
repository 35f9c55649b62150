"""How masked_batch_norm is called: differentiated, repeated, compiled, traced, captured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.host_reads import host_reads
from support.norm_cases import (
    ACTIVATIONS,
    STATISTICS,
    Case,
    Inputs,
    assert_exact,
    make,
    normalised,
    outcome,
    truth,
)
from support.operations import Calls
from torch._subclasses.fake_tensor import FakeTensorMode

from hubpath_fast import functional as HF

backends = pytest.mark.parametrize("backend", ["triton", "torch"])
both = pytest.mark.parametrize("layout", ["contiguous", "last"])
BLOCK = Case("", n=3, capacity=5, c=6, activation="relu", residual=True)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@backends
def test_gradcheck(backend, activation, n, device):
    case = Case("", n=n, capacity=3, c=2, trailing=(2,), activation=activation, residual=True)
    i = make(case, torch.float64, device)
    for tensor in (i.x, i.residual):
        tensor.nan_to_num_(nan=1.0)  # finite differences are of numbers

    def result(x, weight, bias, residual):
        given = replace(i, x=x, weight=weight, bias=bias, residual=residual)
        for name in STATISTICS:  # each call moves its own
            setattr(given, name, getattr(i, name).clone())
        return normalised(case, given, backend)

    leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.bias, i.residual)]
    assert torch.autograd.gradcheck(result, leaves, fast_mode=True)


def test_a_second_derivative_is_refused(device):
    i = make(BLOCK, torch.float32, device).copy()
    leaves = [i.x, i.weight, i.bias, i.residual]
    y = normalised(BLOCK, i, "triton")
    gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient[:3].square().sum() for gradient in gradients).backward()


def test_no_forward_derivative_is_lost_in_silence(device):
    i = make(BLOCK, torch.float32, device)
    with torch.autograd.forward_ad.dual_level():
        i.x = torch.autograd.forward_ad.make_dual(i.x, i.x)
        with pytest.raises(NotImplementedError, match="jvp"):
            normalised(BLOCK, i, "triton")


@both
@backends
def test_repeats_are_bit_equal(backend, layout, device):
    case = replace(BLOCK, n=40, capacity=48, c=37, trailing=(5, 3), layout=layout)
    inputs = make(case, torch.float32, device)
    first, *others = (outcome(case, inputs, backend) for _ in range(3))
    for other in others:
        for name, found in other.items():
            assert torch.equal(found, first[name]), name


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual"])
@backends
def test_each_gradient_alone_is_what_it_is_among_all(backend, needed, device):
    inputs = make(BLOCK, torch.float64, device)
    among = outcome(BLOCK, inputs, backend)[f"d_{needed}"]
    i = inputs.copy()
    for name in ("x", "weight", "bias", "residual"):
        getattr(i, name).requires_grad_(name == needed)
    (alone,) = torch.autograd.grad(normalised(BLOCK, i, backend), getattr(i, needed), inputs.d_y)
    assert torch.equal(alone, among)


@backends
def test_nothing_is_differentiated_without_need(backend, device):
    i = make(BLOCK, torch.float32, device)
    expected = outcome(BLOCK, i, backend)
    with torch.no_grad():
        moving = i.copy()
        y = normalised(BLOCK, moving, backend)
    assert not y.requires_grad
    assert torch.equal(y, expected["y"])
    assert torch.equal(moving.running_var, expected["running_var"])


@backends
def test_the_arguments_are_left_as_they_were(backend, device):
    """All but the statistics: the residual, which a fused sum may be tempted to add up in."""
    i = make(BLOCK, torch.float32, device)
    before = [t.clone() for t in (i.x, i.residual, i.d_y, i.weight, i.bias, i.count)]
    outcome(BLOCK, i, backend)
    after = (i.x, i.residual, i.d_y, i.weight, i.bias, i.count)
    for ours, theirs in zip(before, after, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@both
@backends
def test_a_gradient_without_memory_of_its_own(backend, layout, device):
    """As the sum of all sends back: one number, expanded."""
    case = replace(BLOCK, layout=layout)
    i = make(case, torch.float64, device)
    i.d_y = torch.ones((), dtype=torch.float64, device=device).expand_as(i.x)
    assert_exact(case, outcome(case, i, backend), truth(case, i))


@backends
def test_parameters_may_be_columns_of_a_matrix(backend, device):
    i = make(BLOCK, torch.float64, device)
    expected = truth(BLOCK, i)
    for name in ("weight", "bias"):
        setattr(i, name, torch.stack([getattr(i, name)] * 2, dim=1)[:, 0])
    assert_exact(BLOCK, outcome(BLOCK, i, backend), expected)


def test_it_launches_three_kernels_forward_and_three_backward(launches, device):
    i = make(BLOCK, torch.float32, device).copy()
    y = normalised(BLOCK, i, "kernels")
    forward = ["_statistics_kernel", "_joined_statistics_kernel", "_batch_norm_kernel"]
    assert launches == forward
    torch.autograd.grad(y, [i.x, i.weight, i.bias, i.residual], i.d_y)
    backward = ["_gradient_sums_kernel", "_joined_gradients_kernel", "_input_gradient_kernel"]
    assert launches == [*forward, *backward]


def test_of_a_layer_that_is_first_no_gradient_of_its_input_is_made(launches, device):
    i = make(BLOCK, torch.float32, device).copy()
    y = normalised(BLOCK, replace(i, x=i.x.detach()), "kernels")
    torch.autograd.grad(y, [i.weight, i.bias], i.d_y)
    assert "_input_gradient_kernel" not in launches


def test_no_value_is_read_on_the_host(device):
    """A count that is on a CPU is, by the checks before."""
    i = make(BLOCK, torch.float32, device).copy()
    with host_reads() as found:
        y = normalised(BLOCK, i, "kernels")
        torch.autograd.grad(y, [i.x, i.weight, i.bias, i.residual], i.d_y)
    assert found == []


def test_a_count_written_later_counts(device):
    """As a captured graph is replayed: the same tensors, of which the count has another value."""
    inputs = make(replace(BLOCK, n=5), torch.float64, device)
    count = torch.tensor(0, dtype=torch.int32, device=device)
    for n in (5, 2, 3):
        case = replace(BLOCK, n=n)
        count.fill_(n)
        expected = outcome(
            case, replace(inputs, count=torch.tensor(n, dtype=torch.int32, device=device)), "triton"
        )
        for name, found in outcome(case, replace(inputs, count=count), "triton").items():
            assert torch.equal(found, expected[name])


@both
@backends
def test_compiles_without_a_break(backend, layout, device):
    case = replace(BLOCK, layout=layout)
    inputs = make(case, torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager")
    eager, traced = inputs.copy(), inputs.copy()
    expected, found = normalised(case, eager, backend), compiled(case, traced, backend)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    found.backward(inputs.d_y)
    expected.backward(inputs.d_y)
    for name in ("x", "weight", "bias", "residual"):
        assert torch.equal(getattr(traced, name).grad, getattr(eager, name).grad), name
    for name in STATISTICS:
        assert torch.equal(getattr(traced, name), getattr(eager, name)), name


@backends
def test_another_count_is_not_traced_again(backend, device):
    torch._dynamo.reset()
    graphs = []

    def counted(module, _):
        graphs.append(module)
        return module

    compiled = torch.compile(normalised, fullgraph=True, backend=counted)
    for n in (2, 5, 3):
        case = replace(BLOCK, n=n)
        i = make(case, torch.float32, device)
        with torch.no_grad():
            assert torch.equal(
                compiled(BLOCK, i.copy(), backend), normalised(BLOCK, i.copy(), backend)
            )
    assert len(graphs) == 1


def test_a_count_that_is_too_large_is_the_capacity_where_nobody_may_look(device):
    """The kernel's own is an assertion first."""
    i = make(BLOCK, torch.float64, device)
    x = torch.where(i.x.isnan(), 1.0, i.x)
    counts = [torch.tensor(n, dtype=torch.int32, device=device) for n in (len(x), len(x) + 4)]
    compiled = torch.compile(HF.masked_batch_norm, fullgraph=True, backend="eager")
    expected, found = (compiled(x, count, backend="torch") for count in counts)
    assert torch.equal(found, expected)


@both
@pytest.mark.parametrize("running", [True, False], ids=["kept", "nothing kept"])
def test_opcheck(running, layout, device):
    """And what each operation writes to is what it says."""
    case = replace(BLOCK, layout=layout, running=running)
    with Calls() as calls:
        outcome(case, make(case, torch.float32, device), "triton")
    assert len(calls.seen) >= 2  # forward and backward
    for func, arguments in calls.seen:
        finite = [a.nan_to_num() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                  for a in arguments]  # fmt: skip
        torch.library.opcheck(func, finite)


def test_shapes_without_memory(device):
    i = make(BLOCK, torch.float32, device)
    empty = Inputs(**{name: tensor.to("meta") for name, tensor in vars(i).items()})
    y = normalised(BLOCK, empty, "torch")
    assert y.shape == i.x.shape
    assert normalised(BLOCK, empty, "kernels").shape == i.x.shape


@backends
def test_a_trace_of_fake_tensors_reads_no_count(backend, device):
    """As what measures an expert traces it: with tensors that hold no numbers."""
    i = make(BLOCK, torch.float32, device)
    with FakeTensorMode() as mode:
        fake = Inputs(**{name: mode.from_tensor(tensor) for name, tensor in vars(i).items()})
        assert normalised(BLOCK, fake, backend).shape == i.x.shape


@backends
def test_under_autocast_x_keeps_its_dtype(backend, device):
    """As it comes out of a convolution; parameters stay in float32."""
    i = make(BLOCK, torch.bfloat16, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = outcome(BLOCK, i, backend)
    for name, right in outcome(BLOCK, i, backend).items():
        assert found[name].dtype == right.dtype
        assert torch.equal(found[name], right), name


def test_the_backends_are_chosen_by_device(device):
    """On a CPU torch: which runs where the kernels would be interpreted."""
    case = replace(BLOCK, n=2)
    i = make(case, torch.float32, device)
    chosen = HF.masked_batch_norm(i.x, i.count, activation="silu")
    backend = "triton" if device.type == "cuda" else "torch"
    named = HF.masked_batch_norm(i.x, i.count, activation="silu", backend=backend)
    assert torch.equal(chosen, named)
