"""The aggregator A: turns the weighted, concatenated outputs of the experts into the prediction.

Equation 2 of the paper. The paper leaves its depth open; a linear map that starts as the plain
weighted sum is our default, and that sum itself where the map would be too large (it has M*C*C
weights: half a billion for 5 experts of 10,000 outputs). A two-layer perceptron is the alternative,
and any module that takes the concatenation [N, M*C, ...] can stand in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as HF
from .._torch_ops import linear_over_channels
from .._torch_rows import accumulator
from ..routing import Routing

# Weights of the largest linear map that is the default. 50 M are two ResNet-50s: with gradient and
# Adam's two moments 0.8 GB. Five experts reach it at 3,162 outputs, sixteen at 1,767.
LARGEST_DEFAULT = 50_000_000

# Times K, experts from which on a step takes the sum of the rows: along with the losses it is made
# of the concatenation, of which then one block in eight or fewer is more than zeros.
EXPERTS_A_SLOT = 8

AGGREGATORS = ("auto", "linear", "sum", "mlp")


class SumAggregator(nn.Module):
    """The sum of the experts' weighted outputs: what ``LinearAggregator`` starts as, to keep.

    It has no parameters. Args as of ``LinearAggregator``.
    """

    def __init__(self, num_experts: int, num_outputs: int):
        super().__init__()
        self.num_experts, self.num_outputs = num_experts, num_outputs

    def forward(self, concat: Tensor) -> Tensor:
        """[N, M*C, ...] -> [N, C, ...]."""
        return concat.unflatten(1, (self.num_experts, self.num_outputs)).sum(dim=1)

    def from_rows(self, outputs: Tensor, routing: Routing) -> Tensor:
        """The same prediction straight from the rows [R, C, ...]: of M blocks of the concatenation
        all but K are zeros. A sample's prediction does not depend on M, to the bit."""
        compute = accumulator(outputs.dtype)
        by_slot = outputs.index_select(0, routing.positions.flatten())
        by_slot = by_slot.unflatten(0, routing.positions.shape).to(compute)
        weights = routing.weights.to(compute)
        weighted = by_slot * weights.view(*weights.shape, *[1] * (outputs.dim() - 1))
        return weighted.sum(dim=1).to(outputs.dtype)

    def prefers_rows(self, routing: Routing) -> bool:
        """Whether a step is faster by ``from_rows`` than along with its losses."""
        return routing.num_experts >= EXPERTS_A_SLOT * routing.k

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, num_outputs={self.num_outputs}"


class LinearAggregator(nn.Module):
    """``y = weight @ concat + bias`` over dimension 1; starts as the weighted sum of the experts.

    Args:
        num_experts: M.
        num_outputs: C.

    Parameters: weight [C, M*C] (M identity blocks at the start), bias [C] (zeros).
    """

    def __init__(self, num_experts: int, num_outputs: int):
        super().__init__()
        self.num_experts, self.num_outputs = num_experts, num_outputs
        self.weight = nn.Parameter(torch.eye(num_outputs).repeat(1, num_experts))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, concat: Tensor) -> Tensor:
        """[N, M*C, ...] -> [N, C, ...]."""
        return linear_over_channels(concat, self.weight, self.bias)

    def from_rows(self, outputs: Tensor, routing: Routing) -> Tensor:
        """The same prediction straight from the rows [R, C, ...], without the concatenation."""
        return HF.aggregate(outputs, routing, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, num_outputs={self.num_outputs}"


class MLPAggregator(nn.Module):
    """The weighted sum plus a two-layer perceptron on the concatenation, which starts at zero.

    Args:
        num_experts: M.
        num_outputs: C.
        hidden: width of the hidden layer; default 4*C.
    """

    def __init__(self, num_experts: int, num_outputs: int, hidden: int | None = None):
        super().__init__()
        self.linear = LinearAggregator(num_experts, num_outputs)
        hidden = 4 * num_outputs if hidden is None else hidden
        self.expand = nn.Linear(num_experts * num_outputs, hidden)
        self.contract = nn.Linear(hidden, num_outputs)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, concat: Tensor) -> Tensor:
        """[N, M*C, ...] -> [N, C, ...]."""
        hidden = torch.relu(linear_over_channels(concat, self.expand.weight, self.expand.bias))
        correction = linear_over_channels(hidden, self.contract.weight, self.contract.bias)
        return self.linear(concat) + correction


def make_aggregator(kind: str, num_experts: int, num_outputs: int) -> nn.Module:
    """An aggregator by name, one of ``AGGREGATORS``.

    "auto": linear, or the sum where a linear map would have more than ``LARGEST_DEFAULT`` weights.
    """
    if kind == "auto":
        weights = num_experts * num_outputs**2
        kind = "linear" if weights <= LARGEST_DEFAULT else "sum"
    kinds = {"linear": LinearAggregator, "sum": SumAggregator, "mlp": MLPAggregator}
    return kinds[kind](num_experts, num_outputs)
