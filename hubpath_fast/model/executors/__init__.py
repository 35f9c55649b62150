"""Executors: what runs each expert on its rows.

- ``sequential``: one expert after another.
- ``streams`` (CUDA): experts side by side on a few streams.
- ``graphs`` (CUDA): each expert as captured graphs, one a group size, in training and predictions.
- ``auto``: chooses, and says why (``HubPathway.executor_report()``).
"""

from __future__ import annotations

import torch

from .base import Executor
from .graphs import GraphsExecutor
from .report import ExecutorReport
from .rows import RowSource
from .sequential import SequentialExecutor
from .streams import StreamsExecutor

EXECUTORS = ("auto", "sequential", "streams", "graphs")
_CLASSES = {kind.name: kind for kind in (SequentialExecutor, StreamsExecutor, GraphsExecutor)}

__all__ = [
    "EXECUTORS",
    "Executor",
    "ExecutorReport",
    "RowSource",
    "choose",
    "make_executor",
    "make_report",
]


def choose(asked: str, device: torch.device) -> tuple[str, tuple[str, ...]]:
    """(executor, reasons) for experts on ``device``.

    Raises:
        ValueError: an executor that needs CUDA, for another device.
    """
    if asked == "sequential":
        return asked, ("it was asked for",)
    if asked == "auto":
        if device.type == "cuda":
            reason = (
                "streams and graphs have not been run on a GPU yet; ask for one by "
                'executor="streams" or "graphs", and compare'
            )
        else:
            reason = f"the experts are on {device.type}, and other executors need CUDA"
        return "sequential", (reason,)
    if device.type != "cuda":
        raise ValueError(
            f"executor={asked!r} needs CUDA, but the input is on {device}; move the model and its "
            'input to a GPU, or use executor="auto"'
        )
    return asked, ("it was asked for",)


def make_executor(name: str) -> Executor:
    return _CLASSES[name]()


def make_report(
    asked: str, executor: Executor, reasons: tuple[str, ...], compiled: bool
) -> ExecutorReport:
    c = executor.counters
    return ExecutorReport(
        asked, executor.name, reasons, c.steps, c.host_reads / c.steps if c.steps else None,
        c.hits, c.misses, {i: list(sizes) for i, sizes in c.captured.items()},
        {i: list(sizes) for i, sizes in c.captured_predictions.items()}, c.memory,
        dict(c.eager), c.notes, compiled,
    )  # fmt: skip
