"""Experts as captured CUDA graphs: a replay is one launch where an expert has hundreds.

So is the generator, whose few hundred small kernels would else cost the host as much as all
replays together. What is said of experts here goes for it, too, but that it reads the batch as it
is, and is never padded.

A graph is captured for an expert at a size once that pair was seen a few times: with gradients
forward and backward, in predictions (evaluation mode without gradients) the forward alone. Training
mode without gradients, and in training groups below ``min_group``, run eagerly. An expert whose
captures failed twice runs eagerly from then on, and the report says why.

Experts run concurrently on a few streams, each always on the one that its graphs were captured on.
Experts that share modules share a stream. Torch before 2.14 has one random state for all graphs,
which every replay writes: there all experts share a stream if one of them draws.

Rows are written straight to the static buffers that graphs read, unless those would be too large,
still hold what a backward pass needs, or the input itself requires a gradient.

Memory is freed by the expert: all its sizes share it. An expert's first capture is of the largest
size it has had so far, since memory that is too small for the next size is no use to it. When all
together outgrow the budget, the expert that was used least recently loses its graphs, and must be
seen twice as often to get some again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ... import functional as HF
from ..base import Executor
from ..groups import Group, call_expert, groups_of, join
from ..rows import Batch, InputBuffers, RowSource
from ..sharing import Sharing
from .backend import BrokenCaptureError, CudaBackend
from .capture import CapturedModule, Pool
from .eligible import bucket, may_pad, refusal
from .records import GENERATOR, Record, Step, Use
from .signature import Signature

BUFFERS_FRACTION = 0.25  # of the budget, that the buffers of all rows may take
Output = TypeVar("Output")  # of an expert, or of the generator


class GraphsExecutor(Executor):
    """backend: makes what captures for a device. budget: bytes for graphs; None: the backend's.
    max_failures: captures of an expert that fail before it is eager for good: the first may have
    had a cause outside of it."""

    name, needs = "graphs", "cuda"

    def __init__(
        self,
        backend: Callable[[torch.device], CudaBackend] = CudaBackend,
        budget: int | None = None,
        max_failures: int = 2,
    ):
        super().__init__(backend, budget, max_failures)
        self._make_backend, self._asked, self._max_failures = backend, budget, max_failures
        self._device: torch.device | None = None  # that backend, records and buffers belong to
        self._backend: CudaBackend | None = None
        self._records: OrderedDict[Use, Record] = OrderedDict()  # least recently replayed first
        self._buffers: dict[bool, InputBuffers] = {}  # with gradients, and without
        self._sharing = Sharing()
        self._given_up = False

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        self._start(source.x.device)
        # What needs no counts comes before they are read, while the device is busy.
        gradients = torch.is_grad_enabled()
        uses = [_use(i, expert, gradients) for i, expert in enumerate(experts)]
        for use in filter(None, uses):
            self._meet(use, experts[use.index], source)
        buffers = self._written(source, gradients)
        rows = source.rows() if buffers is None else buffers.rows
        for use in [use for use in self._records if use.index >= len(experts)]:
            del self._records[use]
        streams = self._streams(experts, gradients)
        buffered = buffers is not None
        step = Step(experts, uses, streams, source, rows, buffered, gradients, min_group)
        groups = groups_of(source.routing)
        if buffered:
            groups = [group._replace(start=group.index * buffers.capacity) for group in groups]
        with self._backend.forked({streams[group.index] for group in groups}, rows):
            outputs = [self._run_group(step, group) for group in groups]
        return join(experts, groups, outputs)

    def scores(self, generator: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        self._start(x.device)
        gradients = torch.is_grad_enabled()
        use = _use(GENERATOR, generator, gradients)
        if use is None:
            return generator(x)
        source, stream = Batch(x), 0  # it runs alone; with experts that draw it shares theirs, 0
        self._meet(use, generator, source)
        step = Step([generator], [use], [stream], source, x, False, gradients, 0)
        captured = self._captured(step, use, x)
        if captured is not None and not captured.pool.busy:
            with self._backend.forked([stream], x), self._backend.on(stream):
                return captured(x)
        return self._watched(self._records[use], lambda: generator(x))

    def _start(self, device: torch.device) -> None:
        """Afresh on another device than before: graphs, buffers and streams belong to one."""
        if self._device == device:
            return
        self._device, self._backend = device, self._make_backend(device)
        self._budget = self._backend.budget() if self._asked is None else self._asked
        self._records.clear()
        self._buffers.clear()
        self._given_up = False

    def _streams(self, experts: Sequence[nn.Module], gradients: bool) -> list[int]:
        if self._backend.one_random_state and self._drawing(gradients):
            return [0] * len(experts)
        return [first % self._backend.num_streams for first in self._sharing(experts)]

    def _drawing(self, gradients: bool) -> set[int]:
        """The experts, and the generator, whose graphs draw random numbers, or would."""
        return {
            use.index
            for use, record in self._records.items()
            if use.gradients == gradients and record.draws and record.eager is None
        }

    def _written(self, source: RowSource, gradients: bool) -> InputBuffers | None:
        """What graphs read, with the rows of this batch; None where it must not be written."""
        buffers = self._buffers.get(gradients)
        if buffers is None or source.requires_grad or not buffers.fit(source):
            return None
        # Activations that a backward pass still needs include the rows.
        if any(record.busy for record in self._of_experts(gradients)):
            return None
        buffers.write(source)
        return buffers

    def _of_experts(self, gradients: bool) -> list[Record]:
        return [
            record
            for use, record in self._records.items()
            if use.gradients == gradients and use.index != GENERATOR
        ]

    def _run_group(self, step: Step, group: Group) -> Tensor:
        own = step.rows[group.start : group.start + group.count]
        use, captured = step.uses[group.index], None
        if use is not None and (not use.training or group.count >= step.min_group):
            captured = self._captured(step, use, own)
        with self._backend.on(step.streams[group.index]):
            if captured is not None and not captured.pool.busy:
                self.counters.hits += 1
                return captured(own)
            self.counters.misses += 1
            record = None if use is None else self._records[use]
            return self._watched(record, lambda: self._eager(step, group, own))

    def _watched(self, record: Record | None, run: Callable[[], Output]) -> Output:
        """An eager run, which is looked at if its module may be captured later."""
        if record is None or record.graphs or record.eager is not None:
            return run()
        before = self._backend.random_state()
        output = run()
        record.signature.ran()
        if carried := record.signature.carried:
            record.eager = f"keeps {', '.join(carried)} for later, which a replay would not"
            self._count()
        drew = not torch.equal(before, self._backend.random_state())
        draws = record.draws_unseen or drew
        if draws != record.draws:
            record.draws = draws
            self._count()
        return output

    def _eager(self, step: Step, group: Group, own: Tensor) -> Tensor:
        rows = step.rows
        if step.buffered and step.gradients:  # autograd keeps them; buffers are written again
            group, rows = group._replace(start=0), own.clone()
        return call_expert(step.modules, group, rows, step.min_group, step.source.precision)

    def _meet(self, use: Use, expert: nn.Module, source: Batch) -> None:
        """Starts a record of the expert, and again if what its graphs relied on has changed."""
        record = self._records.get(use)
        if record is None or not record.signature.holds(expert, source):
            # Whether it draws is asked again when it runs; till then its stream is not given away.
            draws = record is not None and record.draws
            # A generator sees the whole batch, and may compare its samples.
            pads = use.index != GENERATOR and may_pad(expert)
            self._records[use] = Record(Signature(expert, source), pads, draws=draws)
            self._count()

    def _captured(self, step: Step, use: Use, own: Tensor) -> CapturedModule | None:
        record, stream = self._records[use], step.streams[use.index]
        if record.eager is not None:
            return None
        if record.graphs and record.stream != stream:  # they replay where they were captured
            record.drop()
        record.stream = stream
        size = bucket(len(own)) if record.may_pad else len(own)
        if size in record.graphs:
            self._records.move_to_end(use)
            return record.graphs[size]
        record.seen[size] += 1
        if self._given_up or record.seen[size] < record.needed or record.busy:
            return None
        record.eager = refusal(step.modules[use.index])
        if record.eager is None:
            sizes = {size} if record.graphs else {size, max(record.seen)}
            try:
                for each in sorted(sizes, reverse=True):
                    if not self._capture(step, use, own, each):
                        break
            except BrokenCaptureError:
                raise
            except Exception as error:  # whatever an expert does that a capture does not allow
                self._failed(record, error)
        self._count()
        return record.graphs.get(size)

    def _capture(self, step: Step, use: Use, own: Tensor, size: int) -> bool:
        """Whether there is a graph of that size now; if not, the expert needs another stream."""
        record, backend = self._records[use], self._backend
        buffers = None if use.index == GENERATOR else self._buffers_for(step)
        if buffers is None:
            layout, like = HF.own_memory_format(own), {"dtype": own.dtype, "device": own.device}
            with torch.inference_mode(False):  # it is written outside of it, too
                inputs = torch.empty((size, *own.shape[1:]), memory_format=layout, **like)
        else:
            inputs = buffers.of(use.index, size)
        if record.pool is None:
            record.pool = Pool(backend.new_pool())
        stream = step.streams[use.index]
        with backend.forked([stream], own), backend.on(stream):
            captured = CapturedModule(step.modules[use.index], own, inputs, record.pool, backend)
        if captured.draws and not record.draws:
            record.draws = record.draws_unseen = True
            if backend.one_random_state:  # it needs another stream
                record.drop()
                return False
        record.graphs[size] = captured
        self._records.move_to_end(use)
        while self._held() > self._budget:
            older = [u for u, r in self._records.items() if r.graphs and u != use]
            if not older:
                break
            # The generator was used in this very step.
            oldest = min(older, key=lambda each: each.index == GENERATOR)
            self._records[oldest].drop()
            self._records[oldest].needed *= 2
        return True

    def _buffers_for(self, step: Step) -> InputBuffers | None:
        """What graphs read the rows of such batches from; None where it would take too much."""
        source, gradients = step.source, step.gradients
        buffers = self._buffers.get(gradients)
        if buffers is not None and buffers.fit(source):
            return buffers
        own = self._of_experts(gradients)
        # An earlier batch may have been larger, and its sizes are captured, too.
        seen = (size for record in own for size in record.seen)
        capacity = bucket(max(source.routing.num_samples, *seen))
        if InputBuffers.nbytes(source, capacity) > BUFFERS_FRACTION * self._budget:
            return None
        for record in own:
            record.graphs.clear()  # they read elsewhere; captured again when they are next seen
        self._buffers[gradients] = InputBuffers(source, capacity)
        return self._buffers[gradients]

    def _failed(self, record: Record, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            for each in self._records.values():
                each.drop()
            self._buffers.clear()
            self._given_up = True
            return
        first = (str(error).strip().splitlines() or [""])[0]
        record.drop()
        record.failures.append(f"{type(error).__name__}: {first}")
        record.needed *= 2
        if len(record.failures) == self._max_failures:
            record.eager = f"cannot be captured: {record.failures[-1]}"

    def _held(self) -> int:
        """Bytes of the pools, and of what graphs read, which many may share."""
        records = self._records.values()
        read = [buffers.rows for buffers in self._buffers.values()]
        read += [graph.inputs for record in records for graph in record.graphs.values()]
        storages = (tensor.untyped_storage() for tensor in read)
        memory = {storage.data_ptr(): storage.nbytes() for storage in storages}
        pools = (record.pool for record in records if record.pool is not None)
        return sum(memory.values()) + sum(pool.memory for pool in pools)

    def _count(self) -> None:
        c = self.counters
        c.memory, c.notes = self._held(), tuple(self._notes())
        experts = {use: r for use, r in self._records.items() if use.index != GENERATOR}
        c.eager = {use.index: r.eager for use, r in experts.items() if r.eager is not None}
        c.captured, c.captured_predictions = {}, {}
        for use in sorted(use for use in experts if experts[use].graphs):
            sizes = c.captured if use.gradients else c.captured_predictions
            sizes[use.index] = sorted({*sizes.get(use.index, []), *experts[use].graphs})

    def _notes(self) -> Iterator[str]:
        if self._given_up:
            yield "out of memory while capturing: all graphs were dropped"
        if self._backend.one_random_state and (drawing := self._drawing(True)):
            names = ", ".join(map(_name, sorted(drawing)))
            yield (
                f"all experts share a stream, since random numbers are drawn by {names}: torch "
                "before 2.14 has one random state for all graphs"
            )
        for use, record in self._records.items():
            if record.failures and record.eager is None:
                failure = record.failures[-1]
                yield f"{_name(use.index)}: a capture failed ({failure}); it is tried once more"
            if use.index == GENERATOR and record.graphs:
                what = "training" if use.training else "evaluation, with gradients"
                what = what if use.gradients else "predictions"
                yield f"the generator: {what} at sizes {sorted(record.graphs)}"
            if use.index == GENERATOR and record.eager is not None:
                yield f"the generator: eager, {record.eager}"


def _name(index: int) -> str:
    return "the generator" if index == GENERATOR else f"experts[{index}]"


def _use(index: int, expert: nn.Module, gradients: bool) -> Use | None:
    """What an expert is run for now; None for what is never captured."""
    if gradients:
        return Use(index, True, expert.training)
    return None if any(m.training for m in expert.modules()) else Use(index, False, False)
