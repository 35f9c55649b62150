"""The executors of one model: which one runs a batch is looked up at every step.

One is kept for each name: a large batch that is evaluated between training steps is run by another
than those, and must not cost them their captured graphs. But once another one is asked for, or on
another device, what cannot be meant any more gives back the memory of its device.

A choice is about speed alone: every executor notices for itself what it must not run. So what may
have changed inside experts is looked at every so many batches only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as HF
from . import remembered
from .base import Executor
from .choice import MAX_SAMPLES_FOR_GRAPHS, Choice, choose, make_executor
from .graphs import GraphsExecutor
from .remembered import Workload
from .report import ExecutorReport
from .structure import Structure, hooks_of

LOOK_EVERY = 64  # batches: a look takes 0.2 ms of five ResNet-50, so 3 us of a batch
_requires_grad = attrgetter("requires_grad")


class _Case(NamedTuple):
    """What a choice was made for, as narrow as it matters."""

    asked: str
    k: int
    device: torch.device
    gradients: bool
    large: bool
    threads: int  # of torch, on a CPU
    exactly: tuple | None  # shape of the batch, and precision: where something was measured

    @property
    def outside(self) -> tuple[str, int, torch.device, int]:
        """All that is not the batch."""
        return (self.asked, self.k, self.device, self.threads)


class _Insides:
    """What choices depend on inside experts: their parts, whether any has hooks, what is frozen."""

    def __init__(self, experts: Sequence[nn.Module]):
        modules = [module for expert in experts for module in expert.modules()]
        self._structure = Structure(modules)
        self._hooks = list(chain.from_iterable(map(hooks_of, modules)))
        self._parameters = [p for expert in experts for p in expert.parameters()]
        self._state = self._read()

    def unchanged(self) -> bool:
        return self._structure.unchanged() and self._state == self._read()

    def _read(self) -> tuple[list[bool], bool]:
        return list(map(_requires_grad, self._parameters)), any(self._hooks)


class ModelExecutors:
    """``executors(asked, experts, k, x)`` -> the one that runs x. A copy starts with nothing.

    asked, experts, k: of the model, as they are now; an ``Executor`` is taken as it is.
    """

    def __init__(self):
        self.made: dict[str, Executor] = {}
        self._experts: list[nn.Module] = []
        self._insides = _Insides([])
        self._until_look = 0  # batches
        self._asked: tuple[str | None, torch.device] | None = None
        self._choices: dict[_Case, Choice] = {}
        self._last: dict[bool, _Case] = {}  # by whether with gradients
        self._obstacles: dict[torch.device, str] = {}
        self._measured = False

    def __reduce__(self):
        return ModelExecutors, ()

    def __call__(
        self, asked: str | Executor, experts: Sequence[nn.Module], k: int, x: Tensor
    ) -> Executor:
        if isinstance(asked, Executor):
            self._let_go(None, x.device)
            return asked
        self._until_look -= 1
        self._look(asked, experts, x.device, inside=self._until_look <= 0)
        exactly = (x.shape, HF.autocast_dtype(x.device.type)) if self._measured else None
        gradients, large = torch.is_grad_enabled(), len(x) > MAX_SAMPLES_FOR_GRAPHS
        case = _Case(asked, k, x.device, gradients, large, _threads(x.device), exactly)
        choice = self._choices.get(case)
        if choice is None:
            precision = HF.autocast_dtype(x.device.type)
            work = Workload(x.device, len(x), gradients, tuple(x.shape[1:]), precision)
            choice = choose(asked, work, experts, k, self._obstacles.get(x.device))
            self._choices[case] = choice
        self._last[gradients] = case
        return self._of(choice)

    def _of(self, choice: Choice) -> Executor:
        if choice.executor not in self.made:
            self.made[choice.executor] = make_executor(choice.executor)
        return self.made[choice.executor]

    def _let_go(self, asked: str | None, device: torch.device) -> None:
        """Drops the executors of a device that are not meant any more. asked: None: one is given.

        What was chosen goes with them, so that no report speaks of executors that are gone."""
        if self._asked == (asked, device):
            return
        self._asked = (asked, device)
        gone = [
            name
            for name, executor in self.made.items()
            if executor.needs not in (None, "cpu")
            and (executor.needs != device.type if asked == "auto" else name != asked)
        ]
        for name in gone:
            del self.made[name]
        self._choices = {c: each for c, each in self._choices.items() if each.executor in self.made}
        self._last = {g: case for g, case in self._last.items() if case in self._choices}

    def _look(
        self, asked: str, experts: Sequence[nn.Module], device: torch.device, inside: bool
    ) -> None:
        """Chooses again after something else than the batch has changed."""
        self._let_go(asked, device)
        same = len(experts) == len(self._experts) and all(map(is_, experts, self._experts))
        if same and inside:
            self._until_look, same = LOOK_EVERY, self._insides.unchanged()
        graphs = self.made.get(GraphsExecutor.name) if asked == "auto" else None
        obstacle = None if graphs is None else graphs.obstacle
        if same and obstacle is None:
            return
        self._choices.clear()
        self._last.clear()
        if not same:
            self._obstacles.clear()
            self._experts, self._measured = list(experts), bool(remembered.stored().measured)
            self._insides, self._until_look = _Insides(experts), LOOK_EVERY
        else:
            self._obstacles[device] = obstacle
            del self.made[GraphsExecutor.name]  # with what it holds for predictions

    def report(
        self,
        asked: str | Executor,
        experts: Sequence[nn.Module],
        k: int,
        device: torch.device,
        compiled: bool,
    ) -> ExecutorReport:
        """Of what runs training steps, or else predictions; before the first batch of what would
        run on ``device``. Where other batches are run otherwise, its notes say so."""
        if isinstance(asked, Executor):
            return make_report(asked.name, asked, Choice(asked.name, ("it was given",)), compiled)
        self._look(asked, experts, device, inside=True)
        case = self._last.get(True) or self._last.get(False)
        now = (asked, k, device, _threads(device))
        if case is None or case.outside != now:
            choice = choose(asked, Workload(device), experts, k, self._obstacles.get(device))
            return make_report(asked, self._of(choice), choice, compiled)
        choice = self._choices[case]
        report = make_report(asked, self._of(choice), choice, compiled)
        others = {
            other: _words(each)
            for each, other in self._choices.items()
            if each.outside == now and other.executor != choice.executor
        }
        notes = tuple(
            f"{words}: {other.executor} ({self._of(other).counters.steps} steps), because "
            f"{'; '.join(other.reasons)}"
            for other, words in others.items()
        )
        return replace(report, notes=report.notes + notes)


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 0


def _words(case: _Case) -> str:
    """The batches of a case."""
    what = "training steps" if case.gradients else "predictions"
    if case.exactly is not None:
        return f"{what} of {case.exactly[0][0]} samples"
    size = "more than" if case.large else "at most"
    return f"{what} of {size} {MAX_SAMPLES_FOR_GRAPHS} samples"


def make_report(asked: str, executor: Executor, choice: Choice, compiled: bool) -> ExecutorReport:
    counted, steps = asdict(executor.counters), executor.counters.steps
    counted["notes"] += choice.notes
    return ExecutorReport(
        asked=asked,
        executor=executor.name,
        reasons=choice.reasons,
        host_reads_per_step=executor.host_reads / steps if steps else None,
        compiled=compiled,
        **counted,
    )
