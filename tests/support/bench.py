"""Stand-ins that let benchmarks of a GPU run on a CPU."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from bench import (
    check_executors,
    check_operations,
    check_padding,
    check_shelf,
    step_models,
    step_rows,
)
from bench.children import Writer
from bench.inputs import Size, batch_norm
from hubpath_fast.executors import of_model
from hubpath_fast.executors.choice import Choice
from hubpath_fast.executors.graphs import GraphsExecutor
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


def make_hub(experts, executor, k=check_executors.K, px=check_executors.PX, **options):
    """As ``check_executors.make_hub``, but graphs are stand-ins. options: of their executor."""
    chosen = GraphsExecutor(Backend, **options) if executor == "graphs" else executor
    return check_executors.make_hub(experts, chosen, k, px)


def chosen_for_cpu(monkeypatch):
    """Lets a model on a CPU run graphs, if it is asked to."""
    choose = of_model.choose

    def chosen(asked, *rest):
        return Choice("graphs", ()) if asked == "graphs" else choose(asked, *rest)

    monkeypatch.setattr(of_model, "choose", chosen)


def graphs_for_cpu(monkeypatch):
    """The same for the rows of steps, on as many lanes as they ask for."""
    chosen_for_cpu(monkeypatch)
    monkeypatch.setattr(Lanes, "asked", [])
    monkeypatch.setattr(step_rows, "CudaBackend", Lanes)
    make = step_rows.GraphsExecutor.__init__  # of copies of a model, too
    monkeypatch.setattr(make, "__defaults__", (Lanes, *make.__defaults__[1:]))


SMALL, TINY_GLUE = Size(9, 4, 2, 6), (9, 4, 2, 5)
SMALL_NORM = batch_norm(6, 9, 5, 3, 4, activation="relu", residual=True)


SMALL_SHELF = check_shelf.Shelf(5, (16, 7), images=11, n=9, k=2, classes=5)


def small_cases(names=check_operations.CASES):
    changes = {"images": {"dtype": "bfloat16"}, "aggregate maps": {"trailing": (4, 5)}}
    return [
        (
            name,
            check_operations.CASES[name][0],
            SMALL_NORM if name == "batch norm" else SMALL._replace(**changes.get(name, {})),
        )
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


def normed_expert():
    """BatchNorm with an activation that has kinks and one that has none; of 32 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, check_executors.C),
    )  # fmt: skip


def small_padding(monkeypatch):
    """Lets checks of padding be of a quarter of the pixels."""
    monkeypatch.setattr(check_padding, "PX", 32)


def linear_experts(names, outputs, px=32):
    return [nn.Sequential(nn.Flatten(), nn.Linear(3 * px * px, outputs)) for _ in names]
