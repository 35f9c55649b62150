"""Checks of BatchNorm over the valid rows of a padded group, beyond its values and gradients.

What a captured graph relies on: another count needs no other capture, whatever lies in the rows
that are padding; and the running statistics move by exactly the valid rows. As ``check_kernels``,
each is a function of a device and a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hubpath_fast import functional as HF
from hubpath_fast.devices import full_float32

from . import operations
from .check_kernels import Case
from .check_operations import label
from .children import Write
from .inputs import Size
from .verdicts import write_verdict

Record = Callable[[Callable[[], list[Tensor]]], Callable[[], list[Tensor]]]
# Sums of float32 over up to a million values, in tens of partial ones: a few units in 1e7.
STATISTICS_TOLERANCE = 1e-5
BATCHES = 3  # that were counted before


def statistics(write: Write, cases: Iterable[Case], device: str, backend: str) -> None:
    """Running mean, variance and number of batches against torch's, in float64, on valid rows."""
    for name, _, size in cases:
        text = f"statistics {label(name, size)}"

        def judge(size=size) -> tuple[str | None, dict]:
            problem, error = _moved(size, device, backend)
            return problem, {"error": error, "quiet": True}

        write_verdict(write, text, judge)


def _moved(size: Size, device: str, backend: str) -> tuple[str | None, float]:
    x, weight, bias, *residual = operations.make("masked_batch_norm", size, device).leaves
    worst = 0.0
    for momentum in (0.1, None):
        count, batches = _integers(size.norm.valid, device)
        before = _running(size.c, device)
        running = [part.clone() for part in before]
        HF.masked_batch_norm(
            x, count, weight, bias, *running, momentum, 1e-5, size.norm.activation,
            *residual or [None], backend, batches,
        )  # fmt: skip
        if batches.item() != BATCHES + 1:
            return f"{batches.item()} batches are counted, not {BATCHES + 1}", worst
        share = 1 / (BATCHES + 1) if momentum is None else momentum
        expected = [part.double() for part in before]
        torch.nn.functional.batch_norm(
            x[: size.norm.valid].double(), *expected, training=True, momentum=share
        )
        for which, found, right in zip(("mean", "variance"), running, expected, strict=True):
            error = operations.relative_error(found, right)
            worst = max(worst, error)
            if not error <= STATISTICS_TOLERANCE:
                return f"running {which}, momentum {momentum}: off by {error:.1e}", worst
    return None, worst


def _integers(valid: int, device: str) -> tuple[Tensor, Tensor]:
    """The count of rows, and that of batches."""
    count = torch.tensor(valid, dtype=torch.int32, device=device)
    return count, torch.tensor(BATCHES, dtype=torch.int64, device=device)


def _running(channels: int, device: str) -> list[Tensor]:
    ramp = torch.linspace(0.0, 1.0, channels, device=device)
    return [ramp - 0.5, ramp + 0.5]


def replays(write: Write, cases: Iterable[Case], device: str, backend: str, record: Record) -> None:
    """A captured layer, replayed with other counts, gives what eager calls give, to the bit, and
    what torch gives on exactly those rows.

    record: makes a replay of a function, which leaves its results in the same tensors each time.
    """
    for name, _, size in cases:
        text = f"recount {label(name, size)}"

        def judge(size=size) -> tuple[str | None, dict]:
            found = next(_differences(size, device, backend, record), None)
            return found, {"text": "the eager bits"}

        write_verdict(write, text, judge)


def _differences(size: Size, device: str, backend: str, record: Record) -> Iterator[str]:
    capacity, given = size.n, size.norm.valid
    # Of finite values in all rows: they are none of a smaller group's.
    full = size._replace(norm=size.norm._replace(valid=capacity))
    operation = operations.make("masked_batch_norm", full, device)
    count, _ = _integers(given, device)
    running = _running(size.c, device)
    replay = record(_call(operation, count, running, backend))
    # Two values of a channel leave nothing of d_x but rounding.
    few = 2 if size.positions > 8 else capacity // 2
    for rows in (capacity, few, 1, 0, given):
        count.fill_(rows)
        for part, start in zip(running, _running(size.c, device), strict=True):
            part.copy_(start)
        found = [*replay(), *running]
        own = _running(size.c, device)
        other = torch.tensor(rows, dtype=torch.int32, device=device)
        expected = [*_call(operation, other, own, backend)(), *own]
        names = [*operation.labels, "running mean", "running variance"]
        for label_, ours, right in zip(names, found, expected, strict=True):
            if not torch.equal(ours, right):
                yield f"{rows} rows: {label_} is not the eager one"
        if rows > 1:
            yield from _unlike_torch(operation, rows, found)


def _unlike_torch(operation: operations.Operation, rows: int, found: list[Tensor]) -> Iterator[str]:
    size = operation.size
    norm = size.norm._replace(valid=rows)
    wide = operation.double()
    with full_float32():
        result = operations.normalized(norm, *wide.leaves)
        expected = [result, *torch.autograd.grad([result], wide.leaves, wide.upstream)]
    # The inputs lie off the kinks for all rows, not for these: some elements of an activation that
    # has kinks are let through by one and not by the other. What is lost or stale is off by more.
    bound = max(operations.TOLERANCE[size.dtype], 1e-2 if size.norm.activation else 0.0)
    for name, ours, right in zip(operation.labels, found, expected, strict=False):
        error = operations.relative_error(ours, right.detach())
        if not error <= bound:
            yield f"{rows} rows: {name}: relative error {error:.1e} above {bound:.0e}"


def _call(
    operation: operations.Operation, count: Tensor, running: list[Tensor], backend: str
) -> Callable[[], list[Tensor]]:
    """Forward and backward of a layer: y and all gradients."""
    activation = operation.size.norm.activation

    def call() -> list[Tensor]:
        leaves = operation.own_leaves()
        x, weight, bias, *residual = leaves
        y = HF.masked_batch_norm(
            x, count, weight, bias, *running, 0.1, 1e-5, activation, *residual or [None], backend
        )
        return [y.detach(), *torch.autograd.grad([y], leaves, operation.upstream)]

    return call
