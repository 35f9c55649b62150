"""Executors: what runs each expert on its rows.

- ``sequential``: one expert after another.
- ``threads`` (CPU): experts concurrent on torch's threads, in training steps.
- ``streams`` (CUDA): experts concurrent on a few streams.
- ``graphs`` (CUDA): each expert as captured graphs, one per group size, in all steps.
- ``auto``: chooses, and says why (``HubPathway.executor_report()``).

Others derive from ``Executor``; ``HubPathway(executor=...)`` takes an object, too.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from .base import Executor
from .graphs import GraphsExecutor
from .precision import RowPrecision
from .report import ExecutorReport
from .rows import RowSource
from .sequential import SequentialExecutor
from .streams import StreamsExecutor
from .threads import ThreadsExecutor

_CLASSES = {
    kind.name: kind
    for kind in (SequentialExecutor, ThreadsExecutor, StreamsExecutor, GraphsExecutor)
}
EXECUTORS = ("auto", *_CLASSES)
MIN_EXPERTS_FOR_THREADS = 4  # with fewer, one thread often waits for the other's last expert

__all__ = [
    "EXECUTORS",
    "Executor",
    "ExecutorReport",
    "RowPrecision",
    "RowSource",
    "check_executor",
    "choose",
    "make_executor",
    "make_report",
]


def check_executor(asked: str) -> None:
    """Raises ValueError for a name that is not one of ``EXECUTORS``."""
    if asked not in EXECUTORS:
        raise ValueError(
            f"executor: expected one of {', '.join(EXECUTORS)}, or an Executor, got {asked!r}"
        )


def choose(asked: str, device: torch.device, num_experts: int) -> tuple[str, tuple[str, ...]]:
    """(executor, reasons) for that many experts on ``device``.

    Raises:
        ValueError: an unknown executor, or one that needs another device.
    """
    check_executor(asked)
    if asked == "auto":
        return _automatic(device, num_experts)
    needed = _CLASSES[asked].needs
    if needed not in (None, device.type):
        place = "a CPU" if needed == "cpu" else "CUDA"
        raise ValueError(
            f"executor: {asked!r} needs {place}, but the input is on {device}; move the model and "
            'its input there, or use executor="auto"'
        )
    return asked, ("it was asked for",)


def _automatic(device: torch.device, num_experts: int) -> tuple[str, tuple[str, ...]]:
    if device.type == "cuda":
        reason = (
            "replays cost the host one launch where an expert has hundreds, and were the fastest "
            "steps on an H100 and an H200, with large experts and small; each new group size is "
            "captured first"
        )
        return "graphs", (reason,)
    if device.type != "cpu":
        return "sequential", (f"the experts are on {device.type}, and others need a CPU or CUDA",)
    threads = torch.get_num_threads()
    if threads == 1:
        return "sequential", ("the experts are on cpu, and torch has one thread",)
    if num_experts < MIN_EXPERTS_FOR_THREADS:
        return "sequential", (
            f"threads gain by {MIN_EXPERTS_FOR_THREADS} experts or more, and the hub has "
            f"{num_experts}",
        )
    return "threads", (
        f"the experts that have rows, at most {threads} at once, share torch's {threads} threads: "
        "they gain more from a few each than one after another from all",
    )


def make_executor(name: str) -> Executor:
    return _CLASSES[name]()


def make_report(
    asked: str, executor: Executor, reasons: tuple[str, ...], compiled: bool
) -> ExecutorReport:
    steps = executor.counters.steps
    return ExecutorReport(
        asked=asked,
        executor=executor.name,
        reasons=reasons,
        host_reads_per_step=executor.host_reads / steps if steps else None,
        compiled=compiled,
        **asdict(executor.counters),
    )
