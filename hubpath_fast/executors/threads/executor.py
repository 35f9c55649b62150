"""Experts side by side on a CPU's cores: two on one core each where one on two gains little.

Layers over the few rows of a group are too small to be divided among cores; whole experts are not.
Torch runs the backward pass of one loss on one thread. So the experts' part of it is its own: each
expert records a graph that starts at its parameters, and one function stands for all of them in the
graph of the loss. When that asks for their gradients, every expert's own graph is run, again side
by side.

How many threads an expert runs on follows from the experts and the routing, never from time, so
that results repeat to the bit. All experts run one after another on the caller's thread in
predictions, which gain nothing here, where rows require a gradient, where one expert has more than
its share of the rows, and in a state of the caller that other threads would not see
(``workers.obstacle``). Single experts do for which ``beside`` gives a reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..groups import Group, call_expert, groups_of, join
from ..rows import RowSource
from ..sequential import SequentialExecutor
from .autograd_graph import leaves_of
from .inspector import Inspector
from .workers import Workers, caller_autocast, obstacle

LANES = 2


class ThreadsExecutor(SequentialExecutor):
    name = "threads"

    def __init__(self):
        super().__init__()
        self._workers: Workers | None = None
        self._inspect = Inspector()
        self._seconds: dict[int, float] = {}  # by expert, of a row in its last forward
        self._enclosed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._drawn = False  # random numbers, by experts that do not look like it

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        if not torch.is_grad_enabled():
            return super().run(experts, source, min_group)
        rows = source.rows()
        found = self._inspect(experts)
        groups = groups_of(source.routing)
        why = self._obstacle(source)
        beside = [g for g in groups if why is None and found[g.index].alone is None]
        counts = [group.count for group in beside]
        if beside and LANES * max(counts) > sum(counts):
            beside = []  # one thread would wait for the largest: both should share it
        notes = [f"experts[{i}] runs alone: it {f.alone}" for i, f in enumerate(found) if f.alone]
        self.counters.notes = tuple(notes) if why is None else (f"one after another: {why}",)
        outputs = {
            group.index: call_expert(experts, group, rows, min_group, source.precision)
            for group in groups
            if group not in beside
        }
        if beside:
            call = partial(self._call, experts, rows, min_group, source, caller_autocast())
            before = torch.get_rng_state()
            own = self._run([partial(call, group) for group in beside], beside)
            self._drawn = not torch.equal(before, torch.get_rng_state())
            parts = [
                Part(group, output, found[group.index].parameters)
                for group, output in zip(beside, own, strict=True)
            ]
            outputs |= self._bridged(experts, parts)
        return join(experts, groups, [outputs[group.index] for group in groups])

    def _obstacle(self, source: RowSource) -> str | None:
        if self._drawn:
            return "an expert draws random numbers, and did not look like it"
        return "the input requires a gradient" if source.requires_grad else obstacle()

    def _call(
        self,
        experts: Sequence[nn.Module],
        rows: Tensor,
        min_group: int,
        source: RowSource,
        autocast: Callable,
        group: Group,
    ) -> Tensor:
        start = time.perf_counter()
        with autocast():
            output = call_expert(experts, group, rows, min_group, source.precision)
        self._seconds[group.index] = (time.perf_counter() - start) / group.count
        return output

    def _run(self, tasks: Sequence[Callable], groups: Sequence[Group]) -> list:
        """Longest first, as far as their last times tell: what is begun late should be short."""
        if self._workers is None or not self._workers.fit:
            self._workers = Workers(LANES)
        costs = [self._seconds.get(group.index, 1.0) * group.count for group in groups]
        return self._workers.run(tasks, sorted(range(len(tasks)), key=lambda i: -costs[i]))

    def _bridged(self, experts: Sequence[nn.Module], parts: list[Part]) -> dict[int, Tensor]:
        """The outputs by expert, as parts of the caller's graph."""
        recorded = []
        for part in parts:
            if isinstance(part.output, Tensor) and part.output.requires_grad:
                expert = experts[part.group.index]
                if expert not in self._enclosed:  # a walk of its whole graph: once
                    self._enclosed[expert] = is_enclosed(part)
                if self._enclosed[expert]:  # else its graph is left in the caller's, as it is
                    recorded.append(part)
        outputs = {part.group.index: part.output for part in parts}
        if recorded:
            leaves = chain.from_iterable(part.parameters for part in recorded)
            bridged = _Bridge.apply(self._run, recorded, *leaves)
            outputs |= {p.group.index: o for p, o in zip(recorded, bridged, strict=True)}
        return outputs


class Part(NamedTuple):
    """One expert's output, the end of its own graph, and the parameters where that starts."""

    group: Group
    output: Tensor
    parameters: list[nn.Parameter]


def is_enclosed(part: Part) -> bool:
    """Whether its graph ends at the expert's own parameters, and at no other tensor."""
    own = {id(parameter) for parameter in part.parameters}
    return all(id(leaf) in own for leaf in leaves_of(part.output))


class _Bridge(torch.autograd.Function):
    """Stands for the experts' own graphs in the caller's: the outputs as they are, and in backward
    the gradients of the parameters."""

    @staticmethod
    def forward(ctx, run: Callable, parts: list[Part], *parameters: Tensor):
        ctx.run, ctx.parts = run, parts
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient
        return tuple(part.output.detach() for part in parts)

    @staticmethod
    def backward(ctx, *d_outputs: Tensor | None):
        create = torch.is_grad_enabled()
        keep = create or torch._C._autograd._get_current_graph_task_keep_graph()

        def gradients(part: Part, d_output: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                part.output, part.parameters, d_output, keep, create, allow_unused=True
            )

        used = [i for i, d_output in enumerate(d_outputs) if d_output is not None]
        tasks = [partial(gradients, ctx.parts[i], d_outputs[i]) for i in used]
        found = [(None,) * len(part.parameters) for part in ctx.parts]
        for i, own in zip(used, ctx.run(tasks, [ctx.parts[i].group for i in used]), strict=True):
            found[i] = own
        return None, None, *chain.from_iterable(found)
