"""Which executor runs a batch, and why: what was asked for, else what was measured on this machine,
else a rule.

On CUDA the rule asks nothing of the device. Captured graphs were the fastest wherever the host has
more launches to make than the device has work to hide them behind, and that is where batches are
small. They are taken where every expert can be captured; whether the memory suffices is known after
the first training steps, when the executor says so (``GraphsExecutor.obstacle``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from . import remembered
from .base import Executor
from .graphs import GraphsExecutor
from .graphs.eligible import refusal
from .groups import expert_name
from .remembered import Measured, Workload
from .sequential import SequentialExecutor
from .streams import StreamsExecutor
from .threads import ThreadsExecutor

CLASSES = {
    kind.name: kind
    for kind in (SequentialExecutor, ThreadsExecutor, StreamsExecutor, GraphsExecutor)
}
EXECUTORS = ("auto", *CLASSES)
MIN_EXPERTS_FOR_THREADS = 4  # with fewer, one thread often waits for the other's last expert
MAX_SAMPLES_FOR_GRAPHS = 256  # with more, the groups of rows fill the device


class Choice(NamedTuple):
    """executor: its name. reasons: why that one. notes: what was not taken into account."""

    executor: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()


def check_executor(asked: str) -> None:
    """Raises ValueError for a name that is not one of ``EXECUTORS``."""
    if asked not in EXECUTORS:
        raise ValueError(
            f"executor: expected one of {', '.join(EXECUTORS)}, or an Executor, got {asked!r}"
        )


def make_executor(name: str) -> Executor:
    return CLASSES[name]()


def runs_on(name: str, device: torch.device) -> bool:
    """Whether there is an executor of that name, and for that type of device."""
    return name in CLASSES and CLASSES[name].needs in (None, device.type)


def choose(
    asked: str,
    work: Workload,
    experts: Sequence[nn.Module],
    k: int,
    obstacle: str | None = None,
) -> Choice:
    """The executor for batches like ``work``.

    Args:
        asked: one of ``EXECUTORS``.
        experts: the hub's, and k active ones of a sample.
        obstacle: why no graphs fit on the device, as far as is known.

    Raises:
        ValueError: an unknown executor, or one that needs another device.
    """
    check_executor(asked)
    if asked == "auto":
        return _automatic(work, experts, k, obstacle)
    if not runs_on(asked, work.device):
        place = "a CPU" if CLASSES[asked].needs == "cpu" else "CUDA"
        raise ValueError(
            f"executor: {asked!r} needs {place}, but the input is on {work.device}; move the model "
            'and its input there, or use executor="auto"'
        )
    return Choice(asked, ("it was asked for",))


def _automatic(
    work: Workload, experts: Sequence[nn.Module], k: int, obstacle: str | None
) -> Choice:
    measured, note = remembered.stored()
    notes = () if note is None else (note,)
    found = remembered.find(measured, experts, k, work) if measured else None
    if found is not None:
        why_not = _why_not(found, work.device, obstacle)
        if why_not is None:
            return Choice(found.executor, (found.sentence(),), notes)
        notes += (f"what `hubpath tune` found on {found.date} is not followed: {why_not}",)
    return by_rule(work, experts, obstacle)._replace(notes=notes)


def _why_not(found: Measured, device: torch.device, obstacle: str | None) -> str | None:
    if not runs_on(found.executor, device):
        return f"there is no executor {found.executor!r} for {device.type}"
    return obstacle if found.executor == GraphsExecutor.name else None


def by_rule(work: Workload, experts: Sequence[nn.Module], obstacle: str | None = None) -> Choice:
    """What ``auto`` takes where nothing was measured."""
    kind = work.device.type
    if kind == "cuda":
        return _on_cuda(work.samples, experts, obstacle)
    if kind != "cpu":
        return Choice("sequential", (f"the experts are on {kind}, and others need a CPU or CUDA",))
    threads = torch.get_num_threads()
    if threads == 1:
        return Choice("sequential", ("the experts are on cpu, and torch has one thread",))
    if len(experts) < MIN_EXPERTS_FOR_THREADS:
        why = (
            f"threads gain by {MIN_EXPERTS_FOR_THREADS} experts or more, and the hub has "
            f"{len(experts)}"
        )
        return Choice("sequential", (why,))
    why = (
        f"the experts that have rows, at most {threads} at once, share torch's {threads} threads: "
        "they gain more from a few each than one after another from all"
    )
    return Choice("threads", (why,))


def _on_cuda(samples: int | None, experts: Sequence[nn.Module], obstacle: str | None) -> Choice:
    if samples is not None and samples > MAX_SAMPLES_FOR_GRAPHS:
        why = (
            f"batches of more than {MAX_SAMPLES_FOR_GRAPHS} samples give each expert enough to do "
            "to fill the device, and the host's launches hide behind that"
        )
        return Choice("sequential", (why,))
    if (named := refused(experts)) is not None:
        why = f"graphs cannot have every expert: {named}; streams run them concurrently, too"
        return Choice("streams", (why,))
    if obstacle is not None:
        return Choice("sequential", (f"{obstacle}; one after another needs the least memory",))
    why = (
        "every expert can be captured: replays cost the host one launch where an expert has "
        "hundreds, and were the fastest steps on an H100 and an H200, with large experts and small"
    )
    return Choice("graphs", (why,))


def refused(experts: Sequence[nn.Module]) -> str | None:
    """The first expert that must not be captured, with the reason; None: all may be."""
    for index, expert in enumerate(experts):
        if (why := refusal(expert)) is not None:
            return f"{expert_name(experts, index)} {why}"
    return None
