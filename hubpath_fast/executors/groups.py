"""What every executor does with one expert's group of rows: call, check, and name who failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..routing import Routing
from .precision import RowPrecision


class Group(NamedTuple):
    """The rows of one expert: ``rows[start : start + count]``, count >= 1."""

    index: int
    start: int
    count: int


def groups_of(routing: Routing) -> list[Group]:
    """The groups that have rows, in the experts' order. Reads the counts: see ``Routing``."""
    groups, start = [], 0
    for index, count in enumerate(routing.counts()):
        if count:
            groups.append(Group(index, start, count))
        start += count
    return groups


def expert_name(experts: Sequence[nn.Module], index: int) -> str:
    return f"experts[{index}] ({type(experts[index]).__name__})"


def call_expert(
    experts: Sequence[nn.Module],
    group: Group,
    rows: Tensor,
    min_group: int,
    precision: RowPrecision,
) -> Tensor:
    """The expert's output for its rows of ``rows`` [R, ...].

    An exception carries a note that names the expert (from Python 3.11 on, which has notes); its
    BatchNorm layers are back in their modes by then.
    """
    expert = experts[group.index]
    own = rows[group.start : group.start + group.count]
    if not own.requires_grad:
        own = own.data  # with a version of its own: an expert may write to its input
    try:
        with (
            running_statistics(expert, expert.training and group.count < min_group),
            precision.watch(expert, own),
        ):
            return expert(own)
    except Exception as error:
        if hasattr(error, "add_note"):
            name = expert_name(experts, group.index)
            error.add_note(f"raised by {name} of the hub, on its {group.count} rows")
        raise


def join(experts: Sequence[nn.Module], groups: list[Group], outputs: list[Tensor]) -> Tensor:
    """The outputs of the groups, in row order, as one tensor [R, C, ...].

    Raises ValueError, naming both experts, where two disagree on the shape of a row's output.
    """
    first = outputs[0]
    for group, output in zip(groups, outputs, strict=True):
        name = expert_name(experts, group.index)
        if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != group.count:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{name}: expected outputs [n, C, ...] for its n={group.count} rows, got {got}"
            )
        if output.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{name} gives outputs of shape {list(output.shape[1:])} per row, but "
                f"{expert_name(experts, groups[0].index)} gives {list(first.shape[1:])}; "
                "all experts need the same C (and map size): replace their heads for the task"
            )
    return torch.cat(outputs)


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether it is a BatchNorm of any kind, one of torch.jit.script's too."""
    scripted = isinstance(layer, torch.jit.ScriptModule)
    return isinstance(layer, _BatchNorm) or (
        scripted and getattr(layer, "original_name", "").startswith("BatchNorm")
    )


@contextlib.contextmanager
def running_statistics(expert: nn.Module, active: bool) -> Iterator[None]:
    """While ``active``, the expert's BatchNorm layers use, and keep, their running statistics.

    The batch statistics of a single row are no statistics: its variance is zero.
    """
    layers = [m for m in expert.modules() if is_batch_norm(m) and m.training] if active else []
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
