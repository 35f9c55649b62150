"""Experts concurrent on a CPU's cores: two on one core each where one on two gains little.

Layers over the few rows of a group are too small to be divided among cores; whole experts are not.
Torch runs the backward pass of one loss on one thread. So the experts' part of it is its own: each
expert records a graph that starts at its parameters, and one function stands for all of them in the
graph of the loss. When that asks for their gradients, the experts' own graphs are run, concurrent
again.

How many threads an expert runs on follows from the experts, the routing and torch's number of
threads (``pools.divide``), never from time, so that results repeat to the bit. All experts run one
after another on the caller's thread in predictions, which gain nothing here, where rows require a
gradient, where one expert has more than half of the rows, and in a state of the caller that other
threads would not see (``pools.obstacle``). Single experts do that must run alone (``inspector``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import torch_private
from ..autograd_graph import leaves_of
from ..groups import Group, call_expert, groups_of, join
from ..rows import RowSource
from ..sequential import SequentialExecutor
from .inspector import Inspector
from .pools import ThreadPools, caller_autocast, divide, obstacle


class ThreadsExecutor(SequentialExecutor):
    """threads: that concurrent experts share; None for as many as torch has at each step."""

    name, needs = "threads", "cpu"

    def __init__(self, threads: int | None = None):
        super().__init__(threads)
        self._threads = threads
        self._pools: ThreadPools | None = None
        self._inspect = Inspector()
        self._seconds: dict[int, float] = {}  # by expert, of a row in its last forward
        self._drawn = False  # random numbers, by experts that do not look like it

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        if not torch.is_grad_enabled():
            return super().run(experts, source, min_group)
        rows = source.rows()
        inspections = self._inspect(experts)
        groups = groups_of(source.routing)
        why = self._obstacle(source)
        concurrent = [g for g in groups if why is None and inspections[g.index].alone is None]
        threads = divide([group.count for group in concurrent], self._total())
        concurrent = concurrent if threads else []
        notes = [
            f"experts[{i}] runs alone: it {inspection.alone}"
            for i, inspection in enumerate(inspections)
            if inspection.alone
        ]
        self.counters.notes = tuple(notes) if why is None else (f"one after another: {why}",)
        outputs = {
            group.index: call_expert(experts, group, rows, min_group, source.precision)
            for group in groups
            if group not in concurrent
        }
        if concurrent:
            call = partial(self._call, experts, rows, min_group, source, caller_autocast())
            before = torch.get_rng_state()
            own = self._run([partial(call, group) for group in concurrent], concurrent, threads)
            self._drawn = not torch.equal(before, torch.get_rng_state())
            parts = [
                Part(group, output, inspections[group.index].parameters, each)
                for group, output, each in zip(concurrent, own, threads, strict=True)
            ]
            outputs |= self._bridged(parts)
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

    def _total(self) -> int:
        return self._threads or torch.get_num_threads()

    def _run(
        self, tasks: Sequence[Callable], groups: Sequence[Group], threads: Sequence[int]
    ) -> list:
        """Longest first, as far as their last times tell: what is begun late should be short."""
        if self._pools is None or not self._pools.fit(self._total()):
            self._pools = ThreadPools(self._total())
        costs = [self._seconds.get(group.index, 1.0) * group.count for group in groups]
        order = sorted(range(len(tasks)), key=lambda i: -costs[i])
        return self._pools.run(tasks, threads, order)

    def _bridged(self, parts: list[Part]) -> dict[int, Tensor]:
        """The outputs by expert, as parts of the caller's graph."""
        # Any other's graph is left in the caller's, as it is. Which one that is may change from
        # step to step: a tensor that is no parameter may be thawed.
        recorded = [part for part in parts if is_enclosed(part)]
        outputs = {part.group.index: part.output for part in parts}
        if recorded:
            leaves = chain.from_iterable(part.parameters for part in recorded)
            bridged = _Bridge.apply(self._run, recorded, *leaves)
            outputs |= {p.group.index: o for p, o in zip(recorded, bridged, strict=True)}
        return outputs


class Part(NamedTuple):
    """One expert's output, the end of its own graph; the parameters where that starts, and how many
    of torch's threads it runs on."""

    group: Group
    output: Tensor
    parameters: list[nn.Parameter]
    threads: int


def is_enclosed(part: Part) -> bool:
    """Whether it has a graph that ends at the expert's own parameters, and at no other tensor."""
    if not (isinstance(part.output, Tensor) and part.output.requires_grad):
        return False
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
        keep = create or torch_private.backward_retains_graph()

        def gradients(part: Part, d_output: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                part.output, part.parameters, d_output, keep, create, allow_unused=True
            )

        pairs = zip(ctx.parts, d_outputs, strict=True)
        used = [(part, d_output) for part, d_output in pairs if d_output is not None]
        tasks = [partial(gradients, part, d_output) for part, d_output in used]
        own = iter(ctx.run(tasks, [p.group for p, _ in used], [p.threads for p, _ in used]))
        found = [
            (None,) * len(part.parameters) if d_output is None else next(own)
            for part, d_output in zip(ctx.parts, d_outputs, strict=True)
        ]
        return None, None, *chain.from_iterable(found)
