"""Predictions of many batches, expert by expert: each is asked about all of them before the next.

Batch by batch, a hub that is larger than memory comes in again for every batch. Expert by expert it
comes in once:

    1. the generator routes every batch; samples and routings are kept
    2. K experts at a time are given all their rows, in groups as large as a batch
    3. each batch's outputs are aggregated with its own routing

Routings and aggregation are those of batch by batch. An expert gets other groups of rows, and a
convolution or a product may round otherwise in a group of another size: float32 predictions are
equal to about 1e-6 of the largest.

Samples and outputs are held between the phases. Once they take ``memory`` bytes, what is there is
answered before more is read: one pass, which brings every expert in once. The order of the experts
turns round from pass to pass, so that those that are there are asked first. Letters: N samples of a
batch, M experts, K active, R rows, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, zip_longest
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..devices import autocast, to_device
from ..executors.groups import expert_name
from ..routing import Routing

if TYPE_CHECKING:
    from .pathway import HubPathway

MEMORY = 2**30  # bytes; 2,000 uint8 images of 224 pixels a side are 0.3 of it


class ExpertMajor:
    """The call of a ``HubPathway`` that predicts expert by expert."""

    def predict_expert_major(
        self: HubPathway,
        batches: Iterable[Tensor],
        device: str | torch.device | None = None,
        memory: int = MEMORY,
    ) -> Iterator[Tensor]:
        """The predictions [N, C, ...] of each batch [N, ...], in their order: what ``predict`` says
        of them, with each expert run on all its rows before the next. For hubs whose experts do not
        fit in memory together.

        Batches are read, and answered, a pass at a time; a batch of one pass is as large as it
        comes. Nothing is recorded for gradients.

        Args:
            batches: on the host, where they wait, as far as there is memory for them.
            device: where the model predicts; None: where the batches are.
            memory: bytes of batches and experts' outputs that are held at a time.

        Raises:
            ValueError: a model in training mode; memory below 1; those of ``predict``.
        """
        pairs = ((x, None) for x in batches)
        return (answer for answer, _, _ in by_expert(self, pairs, device, memory=memory))


def answers(
    model: HubPathway,
    batches: Iterable[tuple[Tensor, Any]],
    device: torch.device,
    amp: str = "none",
    expert_major: bool = False,
) -> Iterator[tuple[Tensor, Routing, Any]]:
    """(prediction, routing, what came with the samples) of each batch, in evaluation mode.

    expert_major: expert by expert, see ``by_expert``; otherwise batch by batch.
    """
    if expert_major:
        yield from by_expert(model, batches, device, amp)
        return
    for x, rest in batches:
        x = to_device(x, device)
        with autocast(device, amp):
            routing = model.route(x)
            prediction = model(x, routing=routing)
        yield prediction, routing, rest


@torch.no_grad()
def by_expert(
    model: HubPathway,
    batches: Iterable[tuple[Tensor, Any]],
    device: str | torch.device | None = None,
    amp: str = "none",
    memory: int = MEMORY,
) -> Iterator[tuple[Tensor, Routing, Any]]:
    """What ``answers`` gives, expert by expert; arguments as of ``predict_expert_major``."""
    if model.training:
        raise ValueError("model: expected one in evaluation mode; call model.eval() first")
    if memory < 1:
        raise ValueError(f"memory: expected a number of bytes of at least 1, got {memory}")
    held: list[_Batch] = []
    order: list[int] = []
    used = 0
    for x, rest in batches:
        on = x.device if device is None else torch.device(device)
        with autocast(on, amp):
            batch = _Batch(x, model.route(to_device(x, on)), rest)
            if not order:
                order, row = _look(model, batch, on)
        needed = held_bytes(x.nbytes, len(batch.samples), row.nbytes)
        if held and used + needed > memory:
            yield from _pass(model, held, order, row, on, amp)
            order.reverse()
            used = 0
        held.append(batch)
        used += needed
    if held:
        yield from _pass(model, held, order, row, on, amp)


def held_bytes(samples: int, rows: int, row: int) -> int:
    """Of samples that take so many bytes, and of their rows' outputs, ``row`` bytes each."""
    return samples + rows * row


class _Batch:
    """A batch between its routing and its aggregation.

    bounds [M+1]: rows of expert i are bounds[i]:bounds[i+1]. samples: int64 [R], the sample of each
    row. outputs: of the rows that were run, in pieces, each under the number of its first row.
    """

    def __init__(self, x: Tensor, routing: Routing, rest: Any):
        self.x, self.routing, self.rest = x, routing, rest
        self.bounds = [0, *accumulate(routing.counts())]
        self.samples = routing.rows.to(x.device, torch.int64) // routing.k
        self.outputs: dict[int, Tensor] = {}

    def joined(self) -> Tensor:
        """The outputs [R, C, ...], in row order."""
        return torch.cat([self.outputs[start] for start in sorted(self.outputs)])


class _Piece(NamedTuple):
    """Rows start:stop of a batch, all of one expert."""

    batch: _Batch
    start: int
    stop: int
    expert: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def x(self) -> Tensor:
        return self.batch.x[self.batch.samples[self.start : self.stop]]


def _look(model: HubPathway, batch: _Batch, device: torch.device) -> tuple[list[int], Tensor]:
    """(the order of the experts, the output [1, C, ...] of a row): the first expert that has rows
    is asked about one of them, and comes first, while it is there."""
    first = next(i for i, count in enumerate(batch.routing.counts()) if count)
    start = batch.bounds[first]
    row = _run(model, [_Piece(batch, start, start + 1, first)], device)
    return [first, *(i for i in range(len(model.experts)) if i != first)], row


def _pass(
    model: HubPathway,
    held: list[_Batch],
    order: Sequence[int],
    row: Tensor,
    device: torch.device,
    amp: str,
) -> Iterator[tuple[Tensor, Routing, Any]]:
    """Runs every expert on its rows of the batches, and answers these; then none is held."""
    for pieces in _calls(held, order, model.k):
        with autocast(device, amp):
            outputs = _run(model, pieces, device)
        if outputs.shape[1:] != row.shape[1:]:
            names = ", ".join(expert_name(model.experts, i) for i in {p.expert for p in pieces})
            raise ValueError(
                f"{names}: outputs of shape {list(outputs.shape[1:])} per row, but "
                f"{expert_name(model.experts, order[0])} gives {list(row.shape[1:])}; all experts "
                "need the same C (and map size): replace their heads for the task"
            )
        for piece, own in zip(pieces, outputs.split([p.count for p in pieces]), strict=True):
            piece.batch.outputs[piece.start] = own
    for batch in held:
        batch.x = None  # before predictions take memory, too
    held.reverse()
    while held:
        batch = held.pop()
        with autocast(device, amp):
            prediction = model._aggregate(to_device(batch.joined(), device), batch.routing)
        yield prediction, batch.routing, batch.rest


def _calls(held: Sequence[_Batch], order: Sequence[int], k: int) -> Iterator[list[_Piece]]:
    """What is run at once: of up to K experts as many rows as a batch has samples, in row order.

    K experts are what a sample needs, so there is room for them; the next comes when one of them
    has had all its rows. Concurrent executors have several to run, as they have batch by batch.
    """
    size, left = max(len(batch.x) for batch in held), iter(order)

    def lane() -> Iterator[list[_Piece]]:
        for expert in left:  # the next one that no lane has
            yield from _groups(held, expert, size)

    for groups in zip_longest(*(lane() for _ in range(k)), fillvalue=()):
        pieces = [piece for group in groups for piece in group]
        yield sorted(pieces, key=attrgetter("expert"))


def _groups(held: Sequence[_Batch], expert: int, size: int) -> Iterator[list[_Piece]]:
    """All rows of an expert, ``size`` at a time."""
    group, free = [], size
    for batch in held:
        start, end = batch.bounds[expert : expert + 2]
        while start < end:
            piece = _Piece(batch, start, min(end, start + free), expert)
            group.append(piece)
            start, free = piece.stop, free - piece.count
            if free == 0:
                yield group
                group, free = [], size
    if group:
        yield group


def _run(model: HubPathway, pieces: Sequence[_Piece], device: torch.device) -> Tensor:
    """The outputs [R, C, ...] of pieces in row order, where their batches wait."""
    x = torch.cat([piece.x for piece in pieces])
    routing = _one_each(pieces, len(model.experts), device)
    return model._outputs(to_device(x, device), routing).to(x.device)


def _one_each(pieces: Sequence[_Piece], num_experts: int, device: torch.device) -> Routing:
    """The routing of the pieces' rows, as samples of which each is for one expert alone."""
    counts = [0] * num_experts
    for piece in pieces:
        counts[piece.expert] += piece.count
    sizes = torch.tensor(counts)
    row = torch.arange(sum(counts), dtype=torch.int32)
    plan = {
        "weights": torch.ones(len(row), 1),
        "mean": sizes / len(row),
        "experts": torch.arange(num_experts).repeat_interleave(sizes)[:, None],
        "offsets": torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        "rows": row,
        "positions": row[:, None],
    }
    return Routing(**to_device(plan, device), _counts=counts)
