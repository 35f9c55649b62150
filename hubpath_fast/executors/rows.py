"""A batch and its way to the generator and the experts: what an executor is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import functional as HF
from ..routing import Routing, takes_all
from .precision import RowPrecision


@dataclass(frozen=True)
class Batch:
    """Samples x [N, ...] as the generator reads them."""

    x: Tensor

    @property
    def requires_grad(self) -> bool:
        return self.x.requires_grad and torch.is_grad_enabled()

    @property
    def row_bytes(self) -> int:
        """Of what is read of a sample."""
        return math.prod(self.x.shape[1:]) * self.x.element_size()

    def row_kind(self) -> tuple:
        """What two batches must share for the same graph to read them."""
        x = self.x
        return x.device, x.dtype, x.shape[1:], HF.own_memory_format(x)


@dataclass(frozen=True)
class RowSource(Batch):
    """Samples x [N, ...] that become rows, each normalised for its expert.

    routing, scale and shift are those of ``functional.gather``; dtype and memory_format are of the
    rows. precision: watches what experts do with their rows. most_rows: that any expert may get of
    such batches; None: N.
    """

    routing: Routing
    scale: Tensor | None
    shift: Tensor | None
    dtype: torch.dtype
    memory_format: torch.memory_format
    precision: RowPrecision
    most_rows: int | None = None

    @property
    def group_limit(self) -> int:
        """Rows that any expert may get of such batches."""
        return self.routing.num_samples if self.most_rows is None else self.most_rows

    @property
    def row_bytes(self) -> int:
        return math.prod(self.x.shape[1:]) * self.dtype.itemsize

    def row_kind(self) -> tuple:
        """What rows of two batches must share to lie in one tensor."""
        x = self.x
        return self.routing.num_experts, x.device, self.dtype, x.shape[1:], self.memory_format

    @property
    def is_batch(self) -> bool:
        """Whether the rows of every expert are x as it is: K = M, and nothing in it to change."""
        return (
            takes_all(self.routing)
            and self.scale is None
            and self.shift is None
            and self.dtype == self.x.dtype
            and self.x.is_contiguous(memory_format=self.memory_format)
            and not self.requires_grad
        )

    def rows(self) -> Tensor:
        """[R, ...] in expert order."""
        return HF.gather(
            self.x, self.routing, self.scale, self.shift, self.dtype, self.memory_format
        )


class InputBuffers:
    """Static memory for each expert's rows: ``rows[i * capacity:]`` are those of expert i.

    capacity: at least the ``group_limit`` of every batch that is written here.
    """

    def __init__(self, source: RowSource, capacity: int):
        self.capacity, self.kind = capacity, source.row_kind()
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            shape = (capacity * source.routing.num_experts, *source.x.shape[1:])
            rows = torch.zeros(shape, dtype=source.dtype, device=source.x.device)
            self.rows = rows.contiguous(memory_format=source.memory_format)

    @staticmethod
    def nbytes(source: RowSource, capacity: int) -> int:
        """What buffers for such rows take."""
        return capacity * source.routing.num_experts * source.row_bytes

    def fit(self, source: RowSource) -> bool:
        return self.kind == source.row_kind() and source.group_limit <= self.capacity

    def write(self, source: RowSource) -> None:
        """The rows of a batch; waits for no count. x must not require a gradient."""
        s = source
        HF.gather_into(self.rows, s.x, s.routing, s.scale, s.shift, most_rows=s.most_rows)

    def of(self, index: int, size: int) -> Tensor:
        """The first ``size`` rows of an expert's buffer: a view. size: at most the capacity."""
        if size > self.capacity:
            raise ValueError(
                f"size: expected at most {self.capacity} rows, which the buffer of an expert has "
                f"room for, got {size}; make larger buffers"
            )
        return self.rows[index * self.capacity : index * self.capacity + size]
