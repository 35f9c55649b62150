"""combine, aggregate and exploit_loss as compiled, alone and in one node, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from support.output_cases import (
    ROUNDING,
    Case,
    aggregate_reference,
    assert_within,
    concat_reference,
    double,
    leaves,
    loss_reference,
    make,
    poisoned,
    router_bounds,
    router_reference,
)

from hubpath_fast import kernels

from .router_cases import U

SMOOTHING = 0.1
TEMPERATURE = 0.5
D_LOSS = 3.0  # gradient of the losses


@dataclass(frozen=True)
class Operation:
    """``run(inputs, *leaves)`` gives what ``linear`` does, then the loss, and the router's, each if
    it is there."""

    run: Callable
    leaves: int  # of (outputs, weights, matrix, bias)
    linear: Callable | None  # its reference, a sum of products of the leaves
    loss: bool
    router: bool = False


OPERATIONS = {
    "combine": Operation(
        lambda i, x, w: [kernels.combine(x, w, i)], 2, concat_reference, False
    ),
    "combine with loss": Operation(
        lambda i, x, w: kernels.combine_with_exploit_loss(x, w, i, i.target, SMOOTHING),
        2, concat_reference, True,
    ),
    "aggregate": Operation(
        lambda i, x, w, *dense: [kernels.aggregate(x, w, i, *dense, grouped=True)],
        4, aggregate_reference, False,
    ),
    "aggregate with loss": Operation(
        lambda i, x, w, *dense: kernels.aggregate_with_exploit_loss(
            x, w, i, *dense, i.target, SMOOTHING, grouped=True
        ),
        4, aggregate_reference, True,
    ),
    "combine with both": Operation(
        lambda i, x, w: kernels.combine_with_exploit_loss(
            x, w, i, i.target, SMOOTHING, temperature=TEMPERATURE
        ),
        2, concat_reference, True, True,
    ),
    "aggregate with both": Operation(
        lambda i, x, w, *dense: kernels.aggregate_with_exploit_loss(
            x, w, i, *dense, i.target, SMOOTHING, grouped=True, temperature=TEMPERATURE
        ),
        4, aggregate_reference, True, True,
    ),
    "loss": Operation(
        lambda i, x: [kernels.exploit_loss(x, i, i.target, SMOOTHING)],
        1, None, True,
    ),
}  # fmt: skip


def joined(name: str, case: Case, dtype: torch.dtype) -> None:
    operation, inputs = OPERATIONS[name], make(case, dtype)
    inputs.target.view(-1)[0] = -100  # ignored, and still counted
    sources = (inputs.outputs, inputs.weights, inputs.matrix, inputs.bias)[: operation.leaves]
    tensors, exact = leaves(*sources), double(*sources)
    upstream = [inputs.d_y if operation.leaves == 4 else inputs.d_concat][: bool(operation.linear)]
    upstream += [torch.tensor(D_LOSS)] * (operation.loss + operation.router)
    with poisoned():
        results = operation.run(inputs, *tensors)
        gradients = torch.autograd.grad(results, tensors, upstream)

    expected = [operation.linear(*exact, inputs)] if operation.linear else []
    expected += [loss_reference(exact[0], inputs, SMOOTHING)] * operation.loss
    if operation.router:
        expected.append(router_reference(*exact[:2], inputs, TEMPERATURE, SMOOTHING))
    wanted = torch.autograd.grad(expected, exact, [g.double() for g in upstream])
    bounds, gradient_bounds = error_bounds(operation, inputs, sources, upstream)
    for what, got, right, bound in zip(
        ("result", "loss", "router"), results, expected, bounds, strict=False
    ):
        assert_within(got, right, bound + ROUNDING[got.dtype] * right.abs().detach(), what)
    names = ("d_outputs", "d_weights", "d_matrix", "d_bias")
    for what, got, right, bound in zip(names, gradients, wanted, gradient_bounds, strict=False):
        assert_within(got, right, bound + ROUNDING[got.dtype] * right.abs(), what)


def error_bounds(operation: Operation, inputs, sources, upstream) -> tuple[list, list]:
    """Of the results and of the gradients, before they are rounded to what they are stored as."""
    bounds, gradient_bounds = [], [0.0] * operation.leaves
    k = inputs.experts.shape[1]
    if operation.linear:
        # As many roundings as the longest chain of additions has, and some products, each relative
        # to the sum of the terms without their signs.
        per_sample = (inputs.outputs[0].numel(), inputs.d_concat[0].numel(), inputs.d_y[0].numel())
        per_expert = inputs.rows.numel() * inputs.target[0].numel()
        chain = (max(*per_sample, per_expert, *inputs.matrix.shape) + 8) * U
        positive = double(*sources, absolute=True)
        terms = operation.linear(*positive, inputs)
        gradient_terms = torch.autograd.grad(terms, positive, upstream[0].double().abs())
        bounds.append(chain * terms.detach())
        gradient_bounds = [chain * part for part in gradient_terms]
        if operation.leaves == 4:  # weight x d_y is rounded before its product with the outputs
            gradient_bounds[2] += 2 * ROUNDING[inputs.outputs.dtype] * gradient_terms[2]
    if operation.loss:
        # logsumexp adds up to C exponentials, of two roundings each, in blocks of at most 128 and
        # then pairwise: below 160 roundings of a value of about 1 + max |x|.
        unit = 160 * U * (1 + inputs.outputs.double().abs().max().item())
        bounds.append(torch.tensor(k * unit))
        gradient_bounds[0] = gradient_bounds[0] + D_LOSS * unit / inputs.target.numel()
    if operation.router:
        value, gradient = router_bounds(sources[0], sources[1], TEMPERATURE, U)
        bounds.append(torch.tensor(value))
        gradient_bounds[1] = gradient_bounds[1] + D_LOSS * gradient
    return bounds, gradient_bounds


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAPER = Case("48,5,2,100", n=48, c=100, c_out=100)
RAGGED = Case("13,5,2,37", c=37)
MAPS = Case("5,5,2,10 maps 3x5", n=5, trailing=(3, 5))
LAST_MAPS = replace(MAPS, why=f"{MAPS.why} last", channels_last=True)
EVEN_MAPS = Case("5,5,2,16 maps 4x8", n=5, c=16, c_out=16, trailing=(4, 8))
ODD_MAPS = Case("3,5,2,37 maps 9x11", n=3, c=37, c_out=70, trailing=(9, 11))
ODD_LAST = replace(ODD_MAPS, why=f"{ODD_MAPS.why} last", channels_last=True)
GAPS_MAPS = Case("7,6,2,98 maps 8x16", n=7, m=6, c=98, c_out=98, trailing=(8, 16), scores="gaps")
GAPS = Case("20,6,2,130 experts without rows", n=20, m=6, c=130, c_out=5, scores="gaps")
CROWD = Case("150,3,2,136 whole tiles", n=150, m=3, c=136, c_out=72)
LONG = Case("3,2,1,2500 tiles of a row", n=3, m=2, k=1, c=2500)
FUSED = ("combine with loss", "aggregate with loss")
BOTH = ("combine with both", "aggregate with both")
RUNS = [
    (PAPER, FP32, tuple(OPERATIONS)),
    (PAPER, BF16, tuple(OPERATIONS)),
    (RAGGED, FP32, tuple(OPERATIONS)),
    (RAGGED, BF16, tuple(OPERATIONS)),
    (RAGGED, FP16, ("aggregate with loss",)),
    (MAPS, FP32, (*FUSED, *BOTH, "loss")),
    (LAST_MAPS, BF16, FUSED),
    (EVEN_MAPS, BF16, FUSED),
    (ODD_MAPS, FP32, ("aggregate", "aggregate with both")),
    (ODD_MAPS, BF16, ("aggregate",)),
    (ODD_LAST, FP16, ("aggregate",)),
    (ODD_LAST, FP32, ("aggregate with loss",)),
    (GAPS_MAPS, FP32, ("aggregate",)),
    (GAPS_MAPS, BF16, ("aggregate with loss",)),
    (GAPS, BF16, ("aggregate with loss",)),
    (CROWD, BF16, ("aggregate with loss",)),
    (LONG, FP32, ("loss",)),
]
CASES = {
    f"{name} {case.why} {str(dtype).removeprefix('torch.')}": partial(joined, name, case, dtype)
    for case, dtype, names in RUNS
    for name in names
}
