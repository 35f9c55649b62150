"""Stand-ins that let benchmarks of a GPU run on a CPU."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from bench import check_executors, check_operations, step_models, step_rows
from bench.children import Writer
from bench.operations import Size
from hubpath_fast.executors.graphs import GraphsExecutor
from hubpath_fast.model import pathway
from support.graphs import FakeBackend


class Backend(FakeBackend):
    """Says whether it captures, as CUDA does."""

    capturing = False

    def capture(self, function, pool):
        Backend.capturing = True
        try:
            return super().capture(function, pool)
        finally:
            Backend.capturing = False


class Lanes(Backend):
    """On so many streams; ``asked``: how many of each."""

    asked: ClassVar[list] = []

    def __init__(self, device, num_streams=8):
        super().__init__(device)
        self.num_streams = num_streams
        self.asked.append(num_streams)


class Written(list):
    """Takes the lines of a check."""

    def __call__(self, name, ok=True, **values):
        self.append({"name": name, "ok": ok, **values})

    @property
    def verdicts(self):
        return [(row["name"], row["ok"]) for row in self]

    @property
    def failed(self):
        return [row for row in self if not row["ok"]]


def run_here(*skipped):
    """What runs the groups of a command in this process, not in children, but for these."""

    def runner(group, limit, files, stamp):
        if group.name not in skipped:
            group.run(Writer(files, group.name, stamp), 100.0)
        return "ok"

    return runner


def refuses(x):
    if Backend.capturing:
        raise RuntimeError("operation not permitted when stream is capturing")


# What ``check_executors.capture_failures`` is told of these stand-ins.
FAILING = {"read": refuses, "capturing": lambda: Backend.capturing}


def make_hub(experts, executor, **options):
    """As ``check_executors.make_hub``, but graphs are stand-ins. options: of their executor."""
    chosen = GraphsExecutor(Backend, **options) if executor == "graphs" else executor
    return check_executors.make_hub(experts, chosen)


def chosen_for_cpu(monkeypatch):
    """Lets a model on a CPU run graphs, if it is asked to."""
    choose = pathway.choose

    def chosen(asked, device, num_experts):
        return ("graphs", ()) if asked == "graphs" else choose(asked, device, num_experts)

    monkeypatch.setattr(pathway, "choose", chosen)


def graphs_for_cpu(monkeypatch):
    """The same for the rows of steps, on as many lanes as they ask for."""
    chosen_for_cpu(monkeypatch)
    monkeypatch.setattr(Lanes, "asked", [])
    monkeypatch.setattr(step_rows, "CudaBackend", Lanes)
    make = step_rows.GraphsExecutor.__init__  # of copies of a model, too
    monkeypatch.setattr(make, "__defaults__", (Lanes, *make.__defaults__[1:]))


SMALL, TINY_GLUE = Size(9, 4, 2, 6), (9, 4, 2, 5)


def small_cases(names=check_operations.CASES):
    changes = {"images": {"dtype": "bfloat16"}, "aggregate maps": {"trailing": (4, 5)}}
    return [
        (name, check_operations.CASES[name][0], SMALL._replace(**changes.get(name, {})))
        for name in names
    ]


PRESET = step_models.Preset(
    lambda: [
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5)
        )
        for _ in range(3)
    ],
    24, 2, 5, (16,), {16: 4}, 4,
)  # fmt: skip


def linear_experts(names, outputs):
    return [nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, outputs)) for _ in names]
