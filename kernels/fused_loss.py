"""The exploit loss together with combine or aggregate: one backward for both.

In training a row's output feeds the prediction and the exploit loss. Separately, each would write
a gradient of the row and autograd would add the two: three passes more over memory, two launches
more. Here a row is read once and its gradient written once:

    d_outputs[r] = w * d_concat[n, i*C:(i+1)*C] + d_loss/N * (softmax(outputs[r]) - smoothed onehot)

Forward, aggregate's last launch also adds up the loss, which saves another.

The router's loss (router_loss.py) takes the rows' losses that are there: one launch more forward,
which leaves its gradient as well, and one backward, which adds that to d_weights.
"""

from __future__ import annotations

from torch import Tensor

from ._common import RowPlan
from .aggregate import apply_grouped, choose_grouped, linear
from .combine import apply_combine


def combine_with_exploit_loss(
    outputs: Tensor,
    weights: Tensor,
    plan: RowPlan,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    temperature: float | None = None,
) -> tuple[Tensor, ...]:
    """``(combine(...), exploit_loss(...))`` as one node: three launches forward, one backward.

    Arguments, results and errors are those of ``combine`` and ``exploit_loss``; a ``temperature``
    adds ``router_loss(...)`` at it.
    """
    return apply_combine(outputs, weights, plan, target, label_smoothing, ignore_index, temperature)


def aggregate_with_exploit_loss(
    outputs: Tensor,
    weights: Tensor,
    plan: RowPlan,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    grouped: bool | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, ...]:
    """``(aggregate(...), exploit_loss(...))``: three launches forward, two backward if grouped.

    Arguments, results and errors are those of ``aggregate`` and ``exploit_loss``; a
    ``temperature`` adds ``router_loss(...)`` at it; ``grouped`` forces the grouped form or the
    dense one, None takes whichever ``choose_grouped`` says.
    """
    asked = (target, label_smoothing, ignore_index, temperature)
    if not (choose_grouped(outputs, weights, plan, matrix) if grouped is None else grouped):
        concat, *losses = apply_combine(outputs, weights, plan, *asked)
        return linear(concat, matrix, bias), *losses
    return apply_grouped(outputs, weights, plan, matrix, bias, *asked)
