"""Executors: what runs each expert on its rows.

An executor takes the gathered rows [R, ...] and the routing and returns the outputs [R, C, ...],
every expert called once, on its own rows only. An expert without rows is not called: its parameters
get no gradient and its buffers do not move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..routing import Routing

EXECUTORS = ("auto", "sequential")


def run_sequential(
    experts: Sequence[nn.Module], rows: Tensor, routing: Routing, min_group: int
) -> Tensor:
    """One expert after another; the outputs, concatenated, are in row order again."""
    outputs, start = [], 0
    for index, (expert, count) in enumerate(zip(experts, routing.counts(), strict=True)):
        if count == 0:
            continue
        group = rows[start : start + count]
        with running_statistics(expert, expert.training and count < min_group):
            output = expert(group)
        outputs.append((index, output))
        start += count
    check_outputs(experts, outputs, routing.counts())
    return torch.cat([output for _, output in outputs])


@contextlib.contextmanager
def running_statistics(expert: nn.Module, active: bool) -> Iterator[None]:
    """While ``active``, the expert's BatchNorm layers use, and keep, their running statistics.

    The batch statistics of a single row are no statistics: its variance is zero.
    """
    layers = (
        [m for m in expert.modules() if isinstance(m, _BatchNorm) and m.training] if active else []
    )
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def check_outputs(
    experts: Sequence[nn.Module], outputs: list[tuple[int, Tensor]], counts: list[int]
) -> None:
    """Raise ValueError, naming both experts, where two disagree on the shape of a row's output."""
    first_index, first = outputs[0]
    for index, output in outputs:
        name = f"experts[{index}] ({type(experts[index]).__name__})"
        if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != counts[index]:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{name}: expected outputs [n, C, ...] for its n={counts[index]} rows, got {got}"
            )
        if output.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{name} gives outputs of shape {list(output.shape[1:])} a row, but "
                f"experts[{first_index}] ({type(experts[first_index]).__name__}) gives "
                f"{list(first.shape[1:])}; all experts need the same C (and map size): "
                "replace their heads for the task"
            )
