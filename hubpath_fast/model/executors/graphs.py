"""Experts as captured CUDA graphs: a replay is one launch where an expert has hundreds.

A graph is captured for an expert at a size once that pair was seen a few times: with gradients
forward and backward, in predictions (evaluation mode without gradients) the forward alone. Training
mode without gradients, and in training groups below ``min_group``, run eagerly. An expert that
cannot be captured runs eagerly from then on, and the report says why.

Experts run side by side on a few lanes (streams), each always on its own. Their rows are written
straight to where their graphs read them, unless such a place would be too large, still holds what a
backward pass needs, or the input itself requires a gradient.

Memory is freed by the expert: all its sizes share it. When all together outgrow the budget, the
expert that was used least recently loses its graphs, and must be seen twice as often to get some
again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backend import Backend, CudaBackend
from .base import Executor
from .capture import CapturedExpert, Pool
from .eligible import bucket, may_pad, refusal, signature
from .groups import Group, call_expert, groups_of, join
from .rows import Places, RowSource

MIN_SEEN = 3  # a capture costs several eager runs; rare sizes never earn it back
PLACES_SHARE = 0.25  # of the budget, that the places of all rows may take


class Use(NamedTuple):
    """One expert, with gradients or without, in training mode or in evaluation mode."""

    index: int
    gradients: bool
    training: bool


@dataclass
class Record:
    """What is known of an expert in one use, as long as its signature holds."""

    signature: tuple
    may_pad: bool
    needed: int  # times that a size must be seen
    seen: Counter[int] = field(default_factory=Counter)  # by size
    graphs: dict[int, CapturedExpert] = field(default_factory=dict)  # by size
    pool: Pool | None = None
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
    """One call of the executor. placed: whether ``rows`` are the places that graphs read."""

    experts: Sequence[nn.Module]
    uses: list[Use | None]
    source: RowSource
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
        self._make_backend, self._budget = backend, budget
        self._backend: Backend | None = None
        self._records: OrderedDict[Use, Record] = OrderedDict()  # least recently replayed first
        self._places: dict[bool, Places] = {}  # with gradients, and without
        self._draws = False  # whether a captured expert draws random numbers
        self._given_up = False

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        if self._backend is None:
            self._backend = self._make_backend(source.x.device)
            self._budget = self._backend.budget() if self._budget is None else self._budget
        # What needs no counts comes before they are read, while the device is busy.
        gradients = torch.is_grad_enabled()
        uses = [_use(i, expert, gradients) for i, expert in enumerate(experts)]
        for use in filter(None, uses):
            self._meet(use, experts[use.index], source)
        places = self._written(source, gradients)
        rows = source.rows() if places is None else places.rows
        step = Step(experts, uses, source, rows, places is not None, gradients, min_group)
        groups = groups_of(source.routing)
        if places is not None:
            groups = [group._replace(start=group.index * places.capacity) for group in groups]
        lanes = {0, *(group.index % self._backend.num_lanes for group in groups)}
        with self._backend.forked(lanes, rows):
            outputs = [self._run_group(step, group) for group in groups]
        return join(experts, groups, outputs)

    def _written(self, source: RowSource, gradients: bool) -> Places | None:
        """The places that graphs read, with the rows of this batch; None where they must not be
        written."""
        places = self._places.get(gradients)
        if places is None or source.requires_grad or not places.hold(source):
            return None
        # Activations that a backward pass still needs include the rows.
        if any(record.busy for use, record in self._records.items() if use.gradients == gradients):
            return None
        places.write(source)
        return places

    def _run_group(self, step: Step, group: Group) -> Tensor:
        own = step.rows[group.start : group.start + group.count]
        use, captured = step.uses[group.index], None
        if use is not None and (not use.training or group.count >= step.min_group):
            captured = self._captured(step, use, own)
        # Torch keeps one random state for all graphs on the device: two that draw must not overlap.
        lane = 0 if self._draws else group.index % self._backend.num_lanes
        with self._backend.lane(lane):
            if captured is not None and not captured.pool.busy:
                self.counters.hits += 1
                return captured(own)
            self.counters.misses += 1
            if step.placed and step.gradients:  # autograd keeps them; their place is written again
                return call_expert(
                    step.experts, group._replace(start=0), own.clone(), step.min_group
                )
            return call_expert(step.experts, group, step.rows, step.min_group)

    def _meet(self, use: Use, expert: nn.Module, source: RowSource) -> None:
        """Starts a record of the expert; anew, if what its graphs took for granted has changed."""
        found = signature(expert, source)
        record = self._records.get(use)
        if record is None or record.signature != found:
            self._records[use] = Record(found, may_pad(expert), MIN_SEEN)
            self._count()

    def _captured(self, step: Step, use: Use, own: Tensor) -> CapturedExpert | None:
        record = self._records[use]
        if record.eager is not None:
            return None
        size = bucket(len(own)) if record.may_pad else len(own)
        if size in record.graphs:
            self._records.move_to_end(use)
            return record.graphs[size]
        record.seen[size] += 1
        if self._given_up or record.seen[size] < record.needed or record.busy:
            return None
        record.eager = refusal(step.experts[use.index])
        if record.eager is None:
            try:
                self._capture(step, use, own, size)
            except Exception as error:  # whatever an expert does that a capture does not allow
                self._failed(record, error)
        self._count()
        return record.graphs.get(size)

    def _capture(self, step: Step, use: Use, own: Tensor, size: int) -> None:
        record, backend = self._records[use], self._backend
        places = self._places_for(step)
        if places is None:
            shape = (size, *own.shape[1:])
            inputs = torch.empty_strided(shape, own.stride(), dtype=own.dtype, device=own.device)
        else:
            inputs = places.of(use.index, size)
        if record.pool is None:
            record.pool = Pool(backend.new_pool())
        lane = use.index % backend.num_lanes
        with backend.forked([lane], own), backend.lane(lane):
            captured = CapturedExpert(step.experts[use.index], own, inputs, record.pool, backend)
        record.graphs[size] = captured
        self._draws |= captured.draws
        self._records.move_to_end(use)
        while self._held() > self._budget:
            older = [r for u, r in self._records.items() if r.graphs and u != use]
            if not older:
                return
            older[0].drop()
            older[0].needed *= 2

    def _places_for(self, step: Step) -> Places | None:
        """Where graphs read the rows of such batches; None where that would take too much."""
        source, gradients = step.source, step.gradients
        places = self._places.get(gradients)
        if places is not None and places.hold(source):
            return places
        capacity = bucket(source.routing.num_samples)
        if Places.nbytes(source, capacity) > PLACES_SHARE * self._budget:
            return None
        for use, record in self._records.items():
            if use.gradients == gradients:
                record.graphs.clear()  # they read elsewhere; captured anew when they are next seen
        self._places[gradients] = source.places(capacity)
        return self._places[gradients]

    def _failed(self, record: Record, error: Exception) -> None:
        if not _out_of_memory(error):
            first = (str(error).strip().splitlines() or [""])[0]
            record.drop()
            record.eager = f"cannot be captured: {type(error).__name__}: {first}"
            return
        for each in self._records.values():
            each.drop()
        self._places.clear()
        self._given_up = True
        self.counters.notes = ("out of memory while capturing: all graphs were dropped",)

    def _held(self) -> int:
        pools = (record.pool for record in self._records.values() if record.pool is not None)
        places = sum(places.rows.nbytes for places in self._places.values())
        return places + sum(pool.memory for pool in pools)

    def _count(self) -> None:
        c = self.counters
        c.memory = self._held()
        c.eager = {use.index: r.eager for use, r in self._records.items() if r.eager is not None}
        for gradients, sizes in ((True, c.captured), (False, c.captured_predictions)):
            sizes.clear()
            for use in sorted(self._records):
                found = self._records[use].graphs
                if use.gradients == gradients and found:
                    sizes[use.index] = sorted({*sizes.get(use.index, []), *found})


def _use(index: int, expert: nn.Module, gradients: bool) -> Use | None:
    """What an expert is run for now; None for what is never captured."""
    if gradients:
        return Use(index, True, expert.training)
    return None if any(m.training for m in expert.modules()) else Use(index, False, False)


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether it is, or came while handling one: a capture that is broken off raises once more."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
