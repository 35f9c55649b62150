"""Experts as captured CUDA graphs: a replay is one launch where an expert has hundreds.

So is the generator, whose few hundred small kernels would else cost the host as much as all
replays together. What is said of experts here goes for it, too, but that it reads the batch as it
is, and is never padded.

With gradients graphs are captured forward and backward, in predictions (evaluation mode without
gradients) the forward alone. At which sizes, and when, says ``capacities``: by themselves after a
few steps, or at once by ``warm_up``. Training mode without gradients, and in training groups below
``min_group``, run eagerly. An expert whose captures failed twice runs eagerly from then on, and the
report says why.

In training BatchNorm couples the rows of a group: padded groups take its statistics from the valid
rows alone (``masked``), but for groups of one row, which run eagerly. An expert in which anything
else may couple rows gets graphs of exact sizes, and the report says why.

Experts run concurrently on a few streams, each always on the one that its graphs were captured on.
Experts that share modules share a stream. Torch before 2.14 has one random state for all graphs,
which every replay writes: there all experts share a stream if one of them draws.

Rows are written straight to the static buffers that graphs read, unless those would be too large,
still hold what a backward pass needs, or the input itself requires a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..base import Executor
from ..groups import Group, call_expert, groups_of, join
from ..rows import Batch, InputBuffers, RowSource
from ..sharing import Sharing
from ..torch_private import has_saved_tensors_hooks
from .backend import CudaBackend
from .capture import CapturedModule, untouched
from .footprint import Footprint
from .records import GENERATOR, Record, Step, Use
from .store import GraphStore

Output = TypeVar("Output")  # of an expert, or of the generator
# Of a step, when warming up: its first run may show that rows are to be gathered in another
# precision, and that experts have to share a stream.
REHEARSALS = 2


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
        self._device: torch.device | None = None  # that backend and store belong to
        self._backend: CudaBackend | None = None
        self._store: GraphStore | None = None
        self._sharing = Sharing()
        self._rehearsals = 0  # left, of the step that is rehearsed now

    @property
    def obstacle(self) -> str | None:
        """Why nothing is captured; None: nothing known speaks against it. Not told in the middle of
        a rehearsal, the rest of which no other executor must run."""
        return None if self._store is None or self._rehearsals else self._store.obstacle

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        self._start(source.x.device)
        # What needs no counts comes before they are read, while the device is busy.
        gradients = torch.is_grad_enabled()
        uses = [_use(i, expert, gradients) for i, expert in enumerate(experts)]
        for use in filter(None, uses):
            self._meet(use, experts[use.index], source)
        buffers = None if self._rehearsals else self._written(source, gradients)
        rows = source.rows() if buffers is None else buffers.rows
        self._store.forget(len(experts))
        streams = self._streams(experts, gradients)
        buffered = buffers is not None
        step = Step(experts, uses, streams, source, rows, buffered, gradients, min_group)
        groups = groups_of(source.routing)
        self._tell_sizes(step)
        self._store.renew_buffers(step)
        if self._rehearsals:
            return self._rehearse(step, groups)
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
            return self._plain(generator, lambda: generator(x))
        source, stream = Batch(x), 0  # it runs alone; with experts that draw it shares theirs, 0
        self._meet(use, generator, source)
        step = Step([generator], [use], [stream], source, x, False, gradients, 0)
        record = self._store.records[use]
        record.sizes.step(len(x), len(x))
        if self._rehearsals:
            found = self._plain(generator, lambda: self._watched(record, lambda: generator(x)))
            self._capture_ahead(step, use, x, len(x))
            return found
        captured = self._captured(step, use, x)
        if captured is not None and not self._store.waits(use):
            with self._backend.forked([stream], x), self._backend.on(stream):
                return captured(x)
        return self._watched(record, lambda: generator(x))

    def warm_up(self, step: Callable[[], object], device: torch.device) -> None:
        self._start(device)
        steps, reads = self.counters.steps, self.host_reads
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                for self._rehearsals in range(REHEARSALS, 0, -1):
                    step()
        finally:
            self._rehearsals = 0
            self.counters.steps, self.host_reads = steps, reads
            self._count()

    def _start(self, device: torch.device) -> None:
        """Afresh on another device than before: graphs, buffers and streams belong to one."""
        if self._device == device:
            return
        self._device, self._backend = device, self._make_backend(device)
        budget = self._backend.budget() if self._asked is None else self._asked
        self._store = GraphStore(self._backend, budget, self._max_failures)

    def _meet(self, use: Use, module: nn.Module, source: Batch) -> None:
        if self._store.meet(use, module, source):
            self._count()

    def _count(self) -> None:
        self._store.summarize(self.counters)

    def _streams(self, experts: Sequence[nn.Module], gradients: bool) -> list[int]:
        if self._backend.one_random_state and self._store.drawing(gradients):
            return [0] * len(experts)
        return [first % self._backend.num_streams for first in self._sharing(experts)]

    def _written(self, source: RowSource, gradients: bool) -> InputBuffers | None:
        """What graphs read, with the rows of this batch; None where it must not be written."""
        buffers = self._store.buffers.get(gradients)
        if buffers is None or source.requires_grad or not buffers.fit(source):
            return None
        # Activations that a backward pass still needs include the rows.
        if self._store.any_waits(gradients):
            return None
        buffers.write(source)
        return buffers

    def _tell_sizes(self, step: Step) -> None:
        """In a rehearsal those that have not heard of it: it is one step, run several times."""
        source = step.source
        again = 0 < self._rehearsals < REHEARSALS
        for use, count in zip(step.uses, source.routing.counts(), strict=True):
            if use is None:
                continue
            sizes = self._store.records[use].sizes
            sizes.least = self._least(step, use)
            if not (again and sizes.top):
                sizes.step(count, source.group_limit)

    def _run_group(self, step: Step, group: Group) -> Tensor:
        own = step.rows[group.start : group.start + group.count]
        use, captured = step.uses[group.index], None
        if use is not None and self._may_replay(step, use, group.count):
            captured = self._captured(step, use, own)
        with self._backend.on(step.streams[group.index]):
            if captured is not None and not self._store.waits(use):
                self.counters.hits += 1
                self.counters.replayed_rows += captured.size
                self.counters.padded_rows += captured.size - group.count
                return captured(own)
            self.counters.misses += 1
            record = None if use is None else self._store.records[use]
            return self._watched(record, lambda: self._eager(step, group, own, record))

    def _least(self, step: Step, use: Use) -> int:
        """Rows of a group that is replayed."""
        least = self._store.records[use].min_rows
        return max(least, step.min_group) if use.training else least

    def _may_replay(self, step: Step, use: Use, count: int) -> bool:
        return count >= self._least(step, use)

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

    def _eager(self, step: Step, group: Group, own: Tensor, record: Record | None) -> Tensor:
        rows = step.rows
        if step.buffered and step.gradients:  # autograd keeps them; buffers are written again
            group, rows = group._replace(start=0), own.clone()
        look = record is not None and step.gradients and self._tells_more(step, group, record)
        if not look or has_saved_tensors_hooks():  # the caller's own would see nothing
            return call_expert(step.modules, group, rows, step.min_group, step.source.precision)
        own = rows[group.start : group.start + group.count]
        with Footprint(step.modules[group.index], own) as kept:
            output = call_expert(step.modules, group, rows, step.min_group, step.source.precision)
        record.kept[group.count] = kept.nbytes
        return output

    def _tells_more(self, step: Step, group: Group, record: Record) -> bool:
        """Whether this run may tell more of what graphs would keep; a smaller group is run in
        evaluation mode, which keeps something else."""
        known = len(record.kept) == 2 or group.count in record.kept or bool(record.graphs)
        return not known and self._may_replay(step, step.uses[group.index], group.count)

    def _captured(self, step: Step, use: Use, own: Tensor) -> CapturedModule | None:
        store, record = self._store, self._store.records[use]
        if record.eager is not None:
            return None
        record.on(step.streams[use.index])
        wanted = record.sizes.wanted(len(own), record.graphs)
        if wanted and store.obstacle is None and not record.busy:
            store.capture(step, use, own, wanted)
            self._count()
        size = record.sizes.place(len(own), record.graphs)
        if size is None:
            return None
        store.records.move_to_end(use)
        return record.graphs[size]

    def _rehearse(self, step: Step, groups: list[Group]) -> Tensor:
        """Each expert runs eagerly as in a step, first on half of its rows too, which tells how
        what autograd keeps grows with them, and is captured in the last rehearsal. One without
        enough rows for it runs on others' in their place: it may well have some in later steps."""
        given = {group.index: group for group in groups}
        some = Group(0, 0, min(step.source.routing.num_samples, len(step.rows)))
        outputs = {}
        for index, use in enumerate(step.uses):
            group, count = given.get(index), 0
            if group is not None and (use is None or self._may_replay(step, use, group.count)):
                count = group.count
            else:
                group = some._replace(index=index)
            outputs[index] = self._rehearse_group(step, group, count)
        return join(step.modules, groups, [outputs[group.index][: group.count] for group in groups])

    def _rehearse_group(self, step: Step, group: Group, count: int) -> Tensor:
        """count: of the rows, how many are the expert's in such a step."""
        use, stream = step.uses[group.index], step.streams[group.index]
        record = None if use is None else self._store.records[use]
        own = step.rows[group.start : group.start + group.count]

        def run() -> Tensor:
            fewer = group._replace(count=group.count // 2)
            first = self._rehearsals == REHEARSALS and record is not None and step.gradients
            if first and self._tells_more(step, fewer, record):
                self._eager(step, fewer, own[: fewer.count], record)
            return self._watched(record, lambda: self._eager(step, group, own, record))

        with self._backend.forked([stream], step.rows), self._backend.on(stream):
            output = self._plain(step.modules[group.index], run)
        if use is not None and self._may_replay(step, use, len(own)):
            self._capture_ahead(step, use, own, count)
        return output.detach()

    def _plain(self, module: nn.Module, run: Callable[[], Output]) -> Output:
        """Runs it; in a rehearsal, so that its module is left as it was."""
        tensors = [*module.buffers(), *module.parameters()] if self._rehearsals else []
        kept = untouched(tensors, self._backend) if tensors else contextlib.nullcontext()
        with kept:
            return run()

    def _capture_ahead(self, step: Step, use: Use, own: Tensor, count: int) -> None:
        record = self._store.records[use]
        record.on(step.streams[use.index])
        wanted = [size for size in record.sizes.ahead(count) if size not in record.graphs]
        ready = self._rehearsals == 1 and record.eager is None and not record.busy
        if ready and wanted and self._store.obstacle is None:
            self._store.capture(step, use, own, wanted)


def _use(index: int, expert: nn.Module, gradients: bool) -> Use | None:
    """What an expert is run for now; None for what is never captured."""
    if gradients:
        return Use(index, True, expert.training)
    return None if any(m.training for m in expert.modules()) else Use(index, False, False)
