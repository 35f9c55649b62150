"""What the graph that autograd recorded of some outputs ends at."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


def accumulators_of(*outputs: Tensor) -> Iterator[Node]:
    """The nodes that accumulate the gradients of leaves, in a backward pass from these."""
    met, pending = set(), [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if hasattr(node, "variable"):
            yield node
        pending += [before for before, _ in node.next_functions]


def leaves_of(*outputs: Tensor) -> Iterator[Tensor]:
    """The tensors whose gradients a backward pass from these outputs would accumulate."""
    return (node.variable for node in accumulators_of(*outputs))
