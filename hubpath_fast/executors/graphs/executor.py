"""Experts as captured CUDA graphs: a replay is one launch where an expert has hundreds.

So is the generator, whose few hundred small kernels would else cost the host as much as all
replays together. What is said of experts here goes for it, too, but that it reads the batch as it
is, and is never padded.

A graph is captured for an expert at a size once that pair was seen a few times: with gradients
forward and backward, in predictions (evaluation mode without gradients) the forward alone. Training
mode without gradients, and in training groups below ``min_group``, run eagerly. An expert whose
captures failed twice runs eagerly from then on, and the report says why.

Experts run concurrently on a few lanes (streams), each always on the one that its graphs were
captured on. Experts that share modules share a lane. Torch before 2.14 has one random state for all
graphs, which every replay writes: there all experts share a lane if one of them draws.

Rows are written straight to where graphs read them, unless such a place would be too large, still
holds what a backward pass needs, or the input itself requires a gradient.

Memory is freed by the expert: all its sizes share it. An expert's first capture is of the largest
size it has had so far, since memory that is too small for the next size is no use to it. When all
together outgrow the budget, the expert that was used least recently loses its graphs, and must be
seen twice as often to get some again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ... import functional as HF
from ..base import Executor
from ..groups import Group, call_expert, groups_of, join
from ..rows import Batch, Places, RowSource
from ..sharing import Sharing
from .backend import Backend, BrokenCaptureError, CudaBackend
from .capture import CapturedModule, Pool
from .eligible import bucket, may_pad, refusal
from .signature import Signature

MIN_SEEN = 3  # a capture costs several eager runs; rare sizes never earn it back
MAX_FAILURES = 2  # captures of an expert: the first may have had a cause outside of it
PLACES_SHARE = 0.25  # of the budget, that the places of all rows may take
GENERATOR = -1  # in the place of an expert's index


Output = TypeVar("Output")  # of an expert, or of the generator


class Use(NamedTuple):
    """One expert, or the generator, with gradients or without, in training mode or not."""

    index: int
    gradients: bool
    training: bool


@dataclass
class Record:
    """What is known of an expert in one use, as long as its signature holds."""

    signature: Signature
    may_pad: bool
    needed: int = MIN_SEEN  # times that a size must be seen
    seen: Counter[int] = field(default_factory=Counter)  # by size
    graphs: dict[int, CapturedModule] = field(default_factory=dict)  # by size
    lane: int | None = None  # that they were captured on
    pool: Pool | None = None
    draws: bool = False  # random numbers, as far as was seen
    draws_unseen: bool = False  # as only a capture showed: its backward draws
    failures: list[str] = field(default_factory=list)  # of captures
    eager: str | None = None  # why it is never captured

    @property
    def busy(self) -> bool:
        return self.pool is not None and self.pool.busy

    def drop(self) -> None:
        """Frees the graphs; a backward that is under way keeps its own until it is done."""
        self.graphs.clear()
        self.seen.clear()
        self.pool = None


class Step(NamedTuple):
    """One call of the executor, or the generator's. placed: whether ``rows`` are the places that
    graphs read."""

    modules: Sequence[nn.Module]  # the experts, or the generator alone
    uses: list[Use | None]
    lanes: list[int]  # of the modules
    source: Batch  # of rows, or as it is
    rows: Tensor
    placed: bool
    gradients: bool
    min_group: int


class GraphsExecutor(Executor):
    """backend: makes what captures for a device; budget: bytes for graphs, None: the backend's."""

    name = "graphs"

    def __init__(
        self,
        backend: Callable[[torch.device], Backend] = CudaBackend,
        budget: int | None = None,
    ):
        super().__init__()
        self._make_backend, self._asked = backend, budget
        self._device: torch.device | None = None  # that backend, records and places belong to
        self._backend: Backend | None = None
        self._records: OrderedDict[Use, Record] = OrderedDict()  # least recently replayed first
        self._places: dict[bool, Places] = {}  # with gradients, and without
        self._sharing = Sharing()
        self._given_up = False

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        self._start(source.x.device)
        # What needs no counts comes before they are read, while the device is busy.
        gradients = torch.is_grad_enabled()
        uses = [_use(i, expert, gradients) for i, expert in enumerate(experts)]
        for use in filter(None, uses):
            self._meet(use, experts[use.index], source)
        places = self._written(source, gradients)
        rows = source.rows() if places is None else places.rows
        for use in [use for use in self._records if use.index >= len(experts)]:
            del self._records[use]
        lanes = self._lanes(experts, gradients)
        step = Step(experts, uses, lanes, source, rows, places is not None, gradients, min_group)
        groups = groups_of(source.routing)
        if places is not None:
            groups = [group._replace(start=group.index * places.capacity) for group in groups]
        with self._backend.forked({lanes[group.index] for group in groups}, rows):
            outputs = [self._run_group(step, group) for group in groups]
        return join(experts, groups, outputs)

    def scores(self, generator: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        self._start(x.device)
        gradients = torch.is_grad_enabled()
        use = _use(GENERATOR, generator, gradients)
        if use is None:
            return generator(x)
        source, lane = Batch(x), 0  # it runs alone; with experts that draw it must share theirs, 0
        self._meet(use, generator, source)
        step = Step([generator], [use], [lane], source, x, False, gradients, 0)
        captured = self._captured(step, use, x)
        if captured is not None and not captured.pool.busy:
            with self._backend.forked([lane], x), self._backend.lane(lane):
                return captured(x)
        return self._watched(self._records[use], lambda: generator(x))

    def _start(self, device: torch.device) -> None:
        """Afresh on another device than before: graphs, places and lanes belong to one."""
        if self._device == device:
            return
        self._device, self._backend = device, self._make_backend(device)
        self._budget = self._backend.budget() if self._asked is None else self._asked
        self._records.clear()
        self._places.clear()
        self._given_up = False

    def _lanes(self, experts: Sequence[nn.Module], gradients: bool) -> list[int]:
        if self._backend.one_random_state and self._drawing(gradients):
            return [0] * len(experts)
        return [first % self._backend.num_lanes for first in self._sharing(experts)]

    def _drawing(self, gradients: bool) -> set[int]:
        """The experts, and the generator, whose graphs draw random numbers, or would."""
        return {
            use.index
            for use, record in self._records.items()
            if use.gradients == gradients and record.draws and record.eager is None
        }

    def _written(self, source: RowSource, gradients: bool) -> Places | None:
        """The places that graphs read, with the rows of this batch; None where they must not be
        written."""
        places = self._places.get(gradients)
        if places is None or source.requires_grad or not places.hold(source):
            return None
        # Activations that a backward pass still needs include the rows.
        if any(record.busy for record in self._of_experts(gradients)):
            return None
        places.write(source)
        return places

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
        with self._backend.lane(step.lanes[group.index]):
            if captured is not None and not captured.pool.busy:
                self.counters.hits += 1
                return captured(own)
            self.counters.misses += 1
            record = None if use is None else self._records[use]
            return self._watched(record, lambda: self._eager(step, group, own))

    def _watched(self, record: Record | None, run: Callable[[], Output]) -> Output:
        """An eager run; of what may be captured later it is looked at."""
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
        if step.placed and step.gradients:  # autograd keeps them; their place is written again
            group, rows = group._replace(start=0), own.clone()
        return call_expert(step.modules, group, rows, step.min_group, step.source.precision)

    def _meet(self, use: Use, expert: nn.Module, source: Batch) -> None:
        """Starts a record of the expert; anew, if what its graphs took for granted has changed."""
        record = self._records.get(use)
        if record is None or not record.signature.holds(expert, source):
            # Whether it draws is asked again when it runs; till then its lane is not given away.
            draws = record is not None and record.draws
            # A generator sees the whole batch, and may compare its samples.
            pads = use.index != GENERATOR and may_pad(expert)
            self._records[use] = Record(Signature(expert, source), pads, draws=draws)
            self._count()

    def _captured(self, step: Step, use: Use, own: Tensor) -> CapturedModule | None:
        record, lane = self._records[use], step.lanes[use.index]
        if record.eager is not None:
            return None
        if record.graphs and record.lane != lane:  # they replay where they were captured
            record.drop()
        record.lane = lane
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
        """Whether there is a graph of that size now; if not, the expert belongs on another lane."""
        record, backend = self._records[use], self._backend
        places = None if use.index == GENERATOR else self._places_for(step)
        if places is None:
            layout, like = HF.own_memory_format(own), {"dtype": own.dtype, "device": own.device}
            with torch.inference_mode(False):  # it is written outside of it, too
                inputs = torch.empty((size, *own.shape[1:]), memory_format=layout, **like)
        else:
            inputs = places.of(use.index, size)
        if record.pool is None:
            record.pool = Pool(backend.new_pool())
        lane = step.lanes[use.index]
        with backend.forked([lane], own), backend.lane(lane):
            captured = CapturedModule(step.modules[use.index], own, inputs, record.pool, backend)
        if captured.draws and not record.draws:
            record.draws = record.draws_unseen = True
            if backend.one_random_state:  # it belongs on another lane
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

    def _places_for(self, step: Step) -> Places | None:
        """Where graphs read the rows of such batches; None where that would take too much."""
        source, gradients = step.source, step.gradients
        places = self._places.get(gradients)
        if places is not None and places.hold(source):
            return places
        own = self._of_experts(gradients)
        # An earlier batch may have been larger, and its sizes are captured, too.
        seen = (size for record in own for size in record.seen)
        capacity = bucket(max(source.routing.num_samples, *seen))
        if Places.nbytes(source, capacity) > PLACES_SHARE * self._budget:
            return None
        for record in own:
            record.graphs.clear()  # they read elsewhere; captured anew when they are next seen
        self._places[gradients] = source.places(capacity)
        return self._places[gradients]

    def _failed(self, record: Record, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            for each in self._records.values():
                each.drop()
            self._places.clear()
            self._given_up = True
            return
        first = (str(error).strip().splitlines() or [""])[0]
        record.drop()
        record.failures.append(f"{type(error).__name__}: {first}")
        record.needed *= 2
        if len(record.failures) == MAX_FAILURES:
            record.eager = f"cannot be captured: {record.failures[-1]}"

    def _held(self) -> int:
        """Bytes of the pools, and of what graphs read, which many may share."""
        records = self._records.values()
        read = [places.rows for places in self._places.values()]
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
        for gradients, sizes in ((True, c.captured), (False, c.captured_predictions)):
            sizes.clear()
            for use in sorted(experts):
                found = experts[use].graphs
                if use.gradients == gradients and found:
                    sizes[use.index] = sorted({*sizes.get(use.index, []), *found})

    def _notes(self) -> Iterator[str]:
        if self._given_up:
            yield "out of memory while capturing: all graphs were dropped"
        if self._backend.one_random_state and (drawing := self._drawing(True)):
            names = ", ".join(map(_name, sorted(drawing)))
            yield (
                f"all experts share a lane, since random numbers are drawn by {names}: torch "
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
