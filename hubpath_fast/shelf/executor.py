"""The heads of all experts in one go: one autograd node, and on a GPU one launch.

Letters: n numbers of images, R rows, D_i features of model i, C outputs, r_i rows of expert i.

    out[rows of i] = F_i[numbers] W_i^T + b_i            F_i [n, D_i], W_i [C, D_i], b_i [C]
    dW_i = dout[rows of i]^T F_i[numbers]    db_i = the sum of dout over the rows of i

An expert has a few rows in a step, so a head costs the bytes of its weights and not arithmetic:
they are read once here, their gradient is written once, and a module call and an autograd node for
each expert would take longer than the products. Stacking all weights for one batched product would
pad every expert to the rows of the largest. Products are made in the weights' dtype, within
autocast too: rows in fewer bits would save nothing, since the weights are what is read.

On a CPU that is a gather and a product an expert. On a GPU each of them would be a launch, which
takes longer than its work: there ``kernels.feature_heads`` serves all experts at once, and the host
knows of no group (see ``bank``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import _backends, _torch_ops
from .._torch_rows import sample_of_row
from ..executors import Executor, RowSource
from ..executors.groups import Group, expert_name, groups_of
from .bank import HeadBank
from .parts import FeatureHead
from .updates import HeadUpdates, can_update


class GroupedHeads(Executor):
    """Runs experts that are ``FeatureHead``s; what it is given are numbers of images.

    Outputs and gradients are the sequential executor's up to rounding, under which an expert
    without rows has no gradient. Features get none.

    backend: None, "triton" or "torch", as of ``functional``.

    Raises ValueError for experts of another kind.
    """

    name = "grouped heads"

    def __init__(self, backend: str | None = None):
        super().__init__(backend)
        self.backend = backend
        self._bank: HeadBank | None = None

    def __call__(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        reads = self.host_reads
        outputs = super().__call__(experts, source, min_group)
        if not source.routing.counts_known:  # nobody has read them
            self.host_reads = reads
        return outputs

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        if _backends.choose(self.backend, source.x) is not _torch_ops:
            return self.bank(experts).outputs(source)
        routing = source.routing
        groups = groups_of(routing)
        heads = [_head(experts, group.index) for group in groups]
        sample = sample_of_row(routing.rows, routing.k)
        numbers = source.x.index_select(0, sample).long()
        weights = [head.layer.weight for head in heads]
        biases = [head.layer.bias for head in heads]
        inputs = [
            head.read(own)
            for head, own in zip(heads, numbers.split([g.count for g in groups]), strict=True)
        ]
        return _Products.apply(groups, inputs, *weights, *biases)

    def bank(self, experts: Sequence[nn.Module]) -> HeadBank:
        """Of these experts, as they are now: their parameters become part of it."""
        if self._bank is None or not self._bank.holds(experts):
            heads = [_head(experts, i) for i in range(len(experts))]
            self._bank = HeadBank(heads, _backends.triton_ops())
        return self._bank

    @contextlib.contextmanager
    def updating(
        self, experts: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        first = _head(experts, 0).layer.weight
        bank = None
        if _backends.choose(self.backend, first) is not _torch_ops:
            bank = self.bank(experts)
        if bank is None or not can_update(bank, optimizer):
            yield
            return
        updates = HeadUpdates(bank, optimizer, _backends.triton_ops())
        hook = optimizer.register_step_pre_hook(updates.step)
        bank.delivers = False
        try:
            yield
        finally:
            hook.remove()
            bank.delivers, bank.flat.grad = True, None
            bank.touched.zero_()


def _head(experts: Sequence[nn.Module], index: int) -> FeatureHead:
    head = experts[index]
    if not isinstance(head, FeatureHead):
        raise ValueError(
            f"{expert_name(experts, index)}: expected a FeatureHead, which reads a shelf's "
            'features; use executor="sequential" for other experts'
        )
    return head


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
