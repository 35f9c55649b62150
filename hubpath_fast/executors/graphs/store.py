"""What is captured of a hub on one device: the graphs of each expert, what they read, their memory.

Memory is freed by the expert: all its sizes share it. Several are captured largest first, since
memory that is too small for the next size is no use to it. When all together outgrow the budget,
the expert that was used least recently loses its graphs, and as much of it must be seen twice over
before it gets some again. Before the first capture for training it is estimated what those of all
experts will take, from what autograd kept of eager runs; if that is beyond the budget, nothing is
captured.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ... import functional as HF
from ..report import Counters
from ..rows import Batch, InputBuffers
from .backend import BrokenCaptureError, CudaBackend
from .capacities import CapacitySizes, SeenSizes, ladder_size
from .capture import CapturedModule, Pool
from .eligible import couples_rows, refusal
from .masked import OtherRowsError, takes_statistics
from .records import GENERATOR, Record, Step, Use, name_of
from .signature import Signature

BUFFERS_FRACTION = 0.25  # of the budget, that the buffers of all rows may take


class GraphStore:
    """backend: captures. budget: bytes. max_failures: of an expert's captures, until it is given
    up. obstacle: why nothing is captured."""

    def __init__(self, backend: CudaBackend, budget: int, max_failures: int):
        self.backend, self._budget, self._max_failures = backend, budget, max_failures
        self.records: OrderedDict[Use, Record] = OrderedDict()  # least recently replayed first
        self.buffers: dict[bool, InputBuffers] = {}  # with gradients, and without
        self.obstacle: str | None = None
        # By (gradients, expert), also of records that were dropped or replaced: all of them read
        # the same buffers, and a backward pass that is still to come keeps its pool.
        self._pools: defaultdict[tuple[bool, int], WeakSet[Pool]] = defaultdict(WeakSet)

    def meet(self, use: Use, module: nn.Module, source: Batch) -> bool:
        """Starts a record of an expert, and again if what its graphs relied on has changed. Whether
        it did."""
        record = self.records.get(use)
        if record is not None and record.signature.holds(module, source):
            return False
        exact, masks, sizes = None, False, SeenSizes(buckets=False)
        if use.index != GENERATOR:  # that sees the whole batch, and may compare its samples
            exact = couples_rows(module)
            if exact is None:
                masks = use.gradients and any(
                    isinstance(part, _BatchNorm) and takes_statistics(part)
                    for part in module.modules()
                )
                sizes = CapacitySizes() if use.gradients else SeenSizes(buckets=True)
        self.records[use] = Record(
            Signature(module, source),
            sizes,
            exact,
            masks,
            # The batch statistics of a single row are no statistics.
            min_rows=2 if masks else 1,
            row_bytes=source.row_bytes,
            # Whether it draws is asked again when it runs; till then its stream is not given away.
            draws=record is not None and record.draws,
        )
        return True

    def waits(self, use: Use) -> bool:
        """Whether a backward pass of that expert, in training mode or not, is still to come: what
        its graphs read must not be written."""
        return any(pool.busy for pool in self._pools[use.gradients, use.index])

    def any_waits(self, gradients: bool) -> bool:
        return any(
            pool.busy
            for (with_gradients, index), pools in self._pools.items()
            if with_gradients == gradients and index != GENERATOR
            for pool in pools
        )

    def renew_buffers(self, step: Step) -> None:
        """For a batch that is larger than any before: else its rows were copied at each step."""
        buffers = self.buffers.get(step.gradients)
        same = buffers is not None and buffers.kind == step.source.row_kind()
        if same and not buffers.fit(step.source):
            self._buffers_for(step)

    def of_experts(self, gradients: bool) -> list[Record]:
        return [
            record
            for use, record in self.records.items()
            if use.gradients == gradients and use.index != GENERATOR
        ]

    def forget(self, num_experts: int) -> None:
        """The experts from that number on."""
        for use in [use for use in self.records if use.index >= num_experts]:
            del self.records[use]

    def drawing(self, gradients: bool) -> set[int]:
        """The experts, and the generator, whose graphs draw random numbers, or would."""
        return {
            use.index
            for use, record in self.records.items()
            if use.gradients == gradients and record.draws and record.eager is None
        }

    def capture(self, step: Step, use: Use, rows: Tensor, sizes: list[int]) -> None:
        """Graphs of some sizes, largest first, or a note why not. rows: some of the expert's."""
        record = self.records[use]
        record.eager = refusal(step.modules[use.index])
        if use.gradients and not self._captured_for_training():
            self.obstacle = self._beyond_budget()
        if record.eager is None and self.obstacle is None:
            try:
                for size in sizes:
                    if not self._capture(step, use, rows[:size], size):
                        break
            except BrokenCaptureError:
                raise
            except Exception as error:  # whatever an expert does that a capture does not allow
                self._failed(record, error)

    def _capture(self, step: Step, use: Use, rows: Tensor, size: int) -> bool:
        """Whether there is a graph of that size now; if not, the expert needs another stream."""
        record, backend = self.records[use], self.backend
        buffers = None if use.index == GENERATOR else self._buffers_for(step)
        if buffers is None:
            layout, like = HF.own_memory_format(rows), {"dtype": rows.dtype, "device": rows.device}
            with torch.inference_mode(False):  # it is written outside of it, too
                inputs = torch.empty((size, *rows.shape[1:]), memory_format=layout, **like)
        else:
            inputs = buffers.of(use.index, size)
        if record.pool is None:
            record.pool = Pool(backend.new_pool())
            self._pools[use.gradients, use.index].add(record.pool)
        stream, module = step.streams[use.index], step.modules[use.index]
        with backend.forked([stream], rows), backend.on(stream):
            captured = CapturedModule(
                module, rows, inputs, record.pool, backend, record.masks, record.fuses
            )
        if captured.draws and not record.draws:
            record.draws = record.draws_unseen = True
            if backend.one_random_state:  # it needs another stream
                record.drop()
                return False
        record.graphs[size] = captured
        record.sizes.captured(size)
        self.records.move_to_end(use)
        while self.held() > self._budget:
            older = [u for u, r in self.records.items() if r.graphs and u != use]
            if not older:
                break
            # The generator was used in this very step.
            oldest = min(older, key=lambda each: each.index == GENERATOR)
            self.records[oldest].drop()
            self.records[oldest].sizes.needed *= 2
        return True

    def _buffers_for(self, step: Step) -> InputBuffers | None:
        """What graphs read the rows of such batches from; None where it would take too much."""
        source, gradients = step.source, step.gradients
        buffers = self.buffers.get(gradients)
        if buffers is not None and buffers.fit(source):
            return buffers
        own = self.of_experts(gradients)
        # An earlier batch may have been larger, and its sizes are captured, too.
        capacity = max(source.group_limit, *(record.sizes.top for record in own))
        if buffers is not None:  # batches that grow step by step must not renew them at each
            capacity = ladder_size(capacity)
        if InputBuffers.nbytes(source, capacity) > BUFFERS_FRACTION * self._budget:
            return None
        for record in own:
            record.free()  # they read elsewhere; captured again when they are next seen
        self.buffers[gradients] = InputBuffers(source, capacity)
        return self.buffers[gradients]

    def _failed(self, record: Record, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            for each in self.records.values():
                each.drop()
            self.buffers.clear()
            self.obstacle = "out of memory while capturing: all graphs were dropped"
            return
        first = (str(error).strip().splitlines() or [""])[0]
        record.drop()
        if isinstance(error, OtherRowsError):  # padding is what it does not allow
            record.exact, record.masks, record.min_rows = first, False, 1
            top, record.sizes = record.sizes.top, SeenSizes(buckets=False)
            record.sizes.top = top
            return
        record.failures.append(f"{type(error).__name__}: {first}")
        record.sizes.needed *= 2
        if len(record.failures) == self._max_failures:
            record.eager = f"cannot be captured: {record.failures[-1]}"

    def _captured_for_training(self) -> bool:
        return any(record.graphs for record in self.of_experts(True))

    def _beyond_budget(self) -> str | None:
        """Why training must not be captured: what the graphs of all experts would take, as far as
        eager runs have shown it."""
        needed = sum(
            record.kept_bytes + record.row_bytes * record.sizes.top
            for record in self.of_experts(True)
            if record.kept
        )
        if needed <= self._budget:
            return None
        return (
            f"the experts' graphs would need some {needed / 2**30:.1f} GiB, and may take "
            f"{self._budget / 2**30:.1f} GiB: nothing is captured"
        )

    def held(self) -> int:
        """Bytes of the pools, and of what graphs read, which many may share."""
        records = self.records.values()
        read = [buffers.rows for buffers in self.buffers.values()]
        read += [graph.inputs for record in records for graph in record.graphs.values()]
        storages = (tensor.untyped_storage() for tensor in read)
        memory = {storage.data_ptr(): storage.nbytes() for storage in storages}
        pools = (record.pool for record in records if record.pool is not None)
        return sum(memory.values()) + sum(pool.memory for pool in pools)

    def summarize(self, c: Counters) -> None:
        c.memory, c.notes = self.held(), tuple(self._notes())
        experts = {use: r for use, r in self.records.items() if use.index != GENERATOR}
        c.eager = {use.index: r.eager for use, r in experts.items() if r.eager is not None}
        c.exact = {
            use.index: r.exact
            for use, r in experts.items()
            if use.gradients and r.exact is not None and r.eager is None
        }
        c.captured, c.captured_predictions = {}, {}
        for use in sorted(use for use in experts if experts[use].graphs):
            sizes = c.captured if use.gradients else c.captured_predictions
            sizes[use.index] = sorted({*sizes.get(use.index, []), *experts[use].graphs})

    def _notes(self) -> Iterator[str]:
        if self.obstacle is not None:
            yield self.obstacle
        if self.backend.one_random_state and (drawing := self.drawing(True)):
            names = ", ".join(map(name_of, sorted(drawing)))
            yield (
                f"all experts share a stream, since random numbers are drawn by {names}: torch "
                "before 2.14 has one random state for all graphs"
            )
        for use, record in self.records.items():
            if record.failures and record.eager is None:
                what = "" if record.fuses or not record.masks else ", without fused BatchNorm"
                now = "was captured at the second try" if record.graphs else "is tried once more"
                failure = record.failures[-1]
                yield f"{name_of(use.index)}: a capture failed ({failure}); it {now}{what}"
            if use.index == GENERATOR and record.graphs:
                what = "training" if use.training else "evaluation, with gradients"
                what = what if use.gradients else "predictions"
                yield f"the generator: {what} at sizes {sorted(record.graphs)}"
            if use.index == GENERATOR and record.eager is not None:
                yield f"the generator: eager, {record.eager}"
