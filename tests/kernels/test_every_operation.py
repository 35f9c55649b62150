"""What holds for every operation and its backward, whatever they compute."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from support.operations import OPERATIONS, SUPERVISED, Calls, aggregated
from support.output_cases import SMALL, SMALL_LAST, Case, leaves, make, tiny_cases
from torch import Tensor

name = attrgetter("__name__")
every_operation = pytest.mark.parametrize("operation", [*OPERATIONS, *SUPERVISED], ids=name)
two_layouts = pytest.mark.parametrize("case", [SMALL, SMALL_LAST], ids=lambda case: case.why)


def differentiable(results) -> list[Tensor]:
    return [result for result in results if result.requires_grad]


def step(operation, inputs) -> list[Tensor]:
    """Results and gradients; whatever is drawn is drawn alike."""
    tensors = leaves(*inputs.sources)
    torch.manual_seed(3)
    results = operation(*tensors, inputs)
    ends = differentiable(results)
    gradients = torch.autograd.grad(ends, tensors, ends, allow_unused=True)
    return [*results, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("curved", [True, False], ids=["behind squares", "behind a sum"])
@every_operation
def test_a_second_derivative_is_refused(operation, curved, device):
    """Asked for one, each says so instead of giving none."""
    inputs = make(SMALL, torch.float32, device)
    tensors = leaves(*inputs.sources)
    ends = differentiable(operation(*tensors, inputs))
    total = sum((r.square() if curved else r).sum() for r in ends)
    gradients = torch.autograd.grad(total, tensors, create_graph=True, allow_unused=True)
    squares = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        squares.backward()


@pytest.mark.parametrize("operation", OPERATIONS, ids=name)
@tiny_cases
def test_gradcheck(operation, case, device):
    inputs = make(case, torch.float64, device)

    def results(*tensors):
        torch.manual_seed(3)
        return tuple(differentiable(operation(*tensors, inputs)))

    assert torch.autograd.gradcheck(results, leaves(*inputs.sources), fast_mode=True)


@every_operation
def test_repeats_are_bit_equal(operation, device):
    inputs = make(Case("", n=40, c=37, c_out=20), torch.float32, device)
    first, *others = (step(operation, inputs) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


def under_autocast(*arguments):
    with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16):
        return aggregated(*arguments)


@two_layouts
@pytest.mark.parametrize("operation", [*OPERATIONS, *SUPERVISED, under_autocast], ids=name)
def test_compiles_without_a_break(operation, case, device):
    inputs = make(case, torch.float32, device)
    torch._dynamo.reset()  # or the code below counts as compiled again for each operation

    def function(*arguments):
        doubled = (argument * 2 for argument in arguments[:-1])
        return operation(*doubled, arguments[-1])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for eager, found in zip(step(function, inputs), step(compiled, inputs), strict=True):
        assert found.stride() == eager.stride()
        assert torch.equal(found, eager)


def with_a_frozen_matrix(outputs, weights, matrix, bias, i):
    return aggregated(outputs, weights, matrix.detach(), bias.detach(), i)


def with_frozen_outputs(outputs, weights, matrix, bias, i):
    return aggregated(outputs.detach(), weights.detach(), matrix, bias, i)


@two_layouts
@pytest.mark.parametrize(
    "operation",
    [*OPERATIONS, *SUPERVISED, with_a_frozen_matrix, with_frozen_outputs],
    ids=name,
)
def test_opcheck(operation, case, device):
    with Calls() as calls:
        step(operation, make(case, torch.float32, device))
    assert len(calls.seen) >= 2  # forward and backward
    for func, arguments in calls.seen:
        torch.library.opcheck(func, arguments)
