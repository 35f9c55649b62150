"""The heads of all experts in one go: a gather and a product an expert, and one autograd node.

Letters: n numbers of images, R rows, D_i features of model i, C outputs, r_i rows of expert i.

    out[rows of i] = F_i[numbers] W_i^T + b_i            F_i [n, D_i], W_i [C, D_i], b_i [C]
    dW_i = dout[rows of i]^T F_i[numbers]    db_i = the sum of dout over the rows of i

An expert has a few rows in a step, so a head costs the bytes of its weights and not arithmetic:
they are read once here, their gradient is written once, and a module call and an autograd node for
each expert would take longer than the products. Stacking all weights for one batched product would
pad every expert to the rows of the largest. Products are made in the weights' dtype, within
autocast too: rows in fewer bits would save nothing, since the weights are what is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._torch_rows import sample_of_row
from ..executors import Executor, RowSource
from ..executors.groups import Group, expert_name, groups_of
from .parts import FeatureHead


class GroupedHeads(Executor):
    """Runs experts that are ``FeatureHead``s; what it is given are numbers of images.

    Outputs and gradients are the sequential executor's up to rounding, under which an expert
    without rows has no gradient. Features get none.

    Raises ValueError for experts of another kind.
    """

    name = "grouped heads"

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        routing = source.routing
        groups = groups_of(routing)
        heads = []
        for group in groups:
            head = experts[group.index]
            if not isinstance(head, FeatureHead):
                raise ValueError(
                    f"{expert_name(experts, group.index)}: expected a FeatureHead, which reads a "
                    'shelf\'s features; use executor="sequential" for other experts'
                )
            heads.append(head)
        sample = sample_of_row(routing.rows, routing.k)
        numbers = source.x.index_select(0, sample).long()
        weights = [head.layer.weight for head in heads]
        biases = [head.layer.bias for head in heads]
        inputs = [
            head.read(own)
            for head, own in zip(heads, numbers.split([g.count for g in groups]), strict=True)
        ]
        return _Products.apply(groups, inputs, *weights, *biases)


class _Products(torch.autograd.Function):
    """(groups, their features [r_i, D_i], W_1, ..., b_1, ...) -> [R, C]."""

    @staticmethod
    def forward(ctx, groups: list[Group], inputs: list[Tensor], *parameters: Tensor) -> Tensor:
        weights, biases = parameters[: len(groups)], parameters[len(groups) :]
        ctx.groups, ctx.inputs = groups, inputs
        rows = sum(group.count for group in groups)
        out = weights[0].new_empty(rows, len(weights[0]))
        with torch.autocast(out.device.type, enabled=False):
            for part, x, weight, bias in zip(
                out.split([g.count for g in groups]), inputs, weights, biases, strict=True
            ):
                torch.addmm(bias, x, weight.t(), out=part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs, count = ctx.needs_input_grad[2:], len(ctx.groups)
        weights: list[Tensor | None] = [None] * count
        biases: list[Tensor | None] = [None] * count
        with torch.autocast(grad.device.type, enabled=False):
            parts = grad.split([group.count for group in ctx.groups])
            for i, (part, x) in enumerate(zip(parts, ctx.inputs, strict=True)):
                if needs[i]:
                    weights[i] = part.t() @ x
                if needs[count + i]:
                    biases[i] = part.sum(0)
        return None, None, *weights, *biases
