"""Executors: what runs each expert on its rows.

- ``sequential``: one expert after another.
- ``threads`` (CPU): experts concurrent on torch's threads, in training steps.
- ``streams`` (CUDA): experts concurrent on a few streams.
- ``graphs`` (CUDA): each expert as captured graphs, of a few group sizes, in all steps.
- ``resident`` (CPU): any of the CPU's around experts that rest in files, of which as many are in
  memory as ``room`` says.
- ``auto``: chooses, and says why (``HubPathway.executor_report()``). ``hubpath tune`` measures
  them on the machine it runs on, and ``auto`` follows what it found.

Others derive from ``Executor``; ``HubPathway(executor=...)`` takes an object, too.
"""

from __future__ import annotations

from .base import Executor
from .choice import EXECUTORS, Choice, check_executor, choose, make_executor
from .of_model import ModelExecutors
from .precision import RowPrecision
from .remembered import Workload
from .report import ExecutorReport
from .resident import ResidentExecutor
from .rows import RowSource
from .sequential import SequentialExecutor
from .streams import StreamsExecutor
from .threads import ThreadsExecutor

__all__ = [
    "EXECUTORS",
    "Choice",
    "Executor",
    "ExecutorReport",
    "ModelExecutors",
    "ResidentExecutor",
    "RowPrecision",
    "RowSource",
    "SequentialExecutor",
    "StreamsExecutor",
    "ThreadsExecutor",
    "Workload",
    "check_executor",
    "choose",
    "make_executor",
]
