"""bench.precompile: that nothing is left to compile for what checks and measurements launch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.bench import FAILING, Lanes, graphs_for_cpu, make_hub
from support.specialisation import specialisation

import hubpath_fast as hp
from bench import (
    check_executors,
    check_kernels,
    check_padding,
    check_shelf,
    glue,
    gpu_check,
    precompile,
    speed_step,
    step_rows,
)
from bench.timing import Times
from hubpath_fast.executors.graphs.masked import masked, settled
from hubpath_fast.shelf.executor import GroupedHeads
from hubpath_fast.shelf.placing import place


@pytest.mark.parametrize(
    ("host", "quota", "expected"),
    [(192, "1600000 100000", 16), (192, "max 100000", 32), (8, "max 100000", 8), (4, None, 4),
     (8, "50000 100000", 1), (2, "1600000 100000", 2)],
)  # fmt: skip
def test_cores_are_those_that_a_container_may_use(tmp_path, monkeypatch, host, quota, expected):
    monkeypatch.setattr(precompile.os, "sched_getaffinity", lambda pid: set(range(host)))
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota + "\n")
    assert precompile.cores(file) == expected


def test_there_are_no_more_workers_than_jobs(monkeypatch):
    forks = []
    monkeypatch.setattr(precompile, "jobs", lambda: [("one", int)])
    monkeypatch.setattr(precompile.os, "fork", lambda: forks.append(1) or 1)
    monkeypatch.setattr(precompile.os, "waitpid", lambda pid, options: (pid, 0))
    assert precompile.compile_all(90, 16) == 0
    assert len(forks) == 1


def keys_of(call):
    """Of all kernels that a call would launch. They are not run: results are what memory held."""
    keys = set()
    with precompile.launches_go_to(
        lambda kernel, *arguments, grid, **options: keys.add(
            specialisation(kernel, *arguments, **options)
        )
    ):
        call()
    return keys


@pytest.fixture(scope="module")
def compiled():
    def all_jobs():
        for _, call in precompile.jobs():
            call()

    return keys_of(all_jobs)


def assert_compiled(found, compiled):
    names = {name for name, _ in found}
    assert {"route_and_plan_kernel", "_route_backward_kernel"} <= names
    assert sorted(found - compiled) == []


@pytest.fixture
def whatever_is_found(monkeypatch):
    """Graphs are stand-ins, and checks go on: nothing was run, so everything they see is wrong."""
    graphs_for_cpu(monkeypatch)
    # The buffers of the paper's images take 72 MB.
    monkeypatch.setattr(Lanes, "budget", lambda self: 10**10)
    for name in ("check", "replays_differ"):
        found = getattr(step_rows, name)
        monkeypatch.setattr(step_rows, name, lambda *a, found=found: [found(*a), None][1])
    monkeypatch.setattr(check_executors, "relative_error", lambda *_: 0.0)


@pytest.mark.parametrize("title", precompile.STEPS)
def test_a_step_that_is_measured(title, write, compiled, whatever_is_found, monkeypatch):
    make = step_rows.make
    graphs = () if "Atari" in title else ("graphs, 1 lane",)  # a noisy network is not captured
    names = ("sequential", *graphs, "glue")

    def in_autocast(*arguments, **options):
        setting = make(*arguments, **options)
        setting.amp = setting.preset.half  # as on a GPU
        return setting

    def once(functions, *_, **__):
        for function in functions.values():
            function()
        return dict.fromkeys(functions, Times.of([1.0]))

    monkeypatch.setattr(step_rows, "make", in_autocast)
    monkeypatch.setattr(speed_step.timing, "interleaved", once)
    preset, px = precompile.STEPS[title]
    found = keys_of(lambda: speed_step.measure(write, preset, px, names, "cpu", 0.1))
    assert write.verdicts == [(name, True) for name in names] * 2
    assert_compiled(found, compiled)


def test_the_checks_of_executors(write, compiled, whatever_is_found):
    def checks():
        check_executors.agreement(write, ["graphs"], "cpu", make_hub)
        check_executors.dropout(write, ["graphs"], "cpu", make_hub)
        check_executors.capture_failures(write, "cpu", make_hub, **FAILING)

    assert_compiled(keys_of(checks), compiled)


def test_the_checks_of_padded_experts(write, compiled, whatever_is_found, monkeypatch):
    monkeypatch.setattr(check_padding, "relative_error", lambda *_: 0.0)
    monkeypatch.setattr(check_padding, "_problem", lambda model: None)  # nothing was routed
    monkeypatch.setattr(check_padding, "COUNTS", check_padding.COUNTS[:5])
    some = {"timm ResNet": check_padding.timm_resnet}
    make = partial(make_hub, budget=10**9)
    found = keys_of(lambda: check_padding.agreement(write, "cpu", make, some))
    assert write.failed == []
    assert {"_statistics_kernel", "_input_gradient_kernel"} <= {name for name, _ in found}
    assert_compiled(found, compiled)


def test_the_experts_of_the_papers_step(compiled):
    """In a graph of 20 rows, of images of another size."""
    module = precompile._resnet50().to(memory_format=torch.channels_last)
    rows = torch.rand(20, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    count = torch.tensor(17, dtype=torch.int32)

    def expert():
        with masked(module, count), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            settled(module(rows)).float().sum().backward()

    found = keys_of(expert)
    assert len(found) > 6
    assert not found - compiled


def test_the_checks_of_the_router_and_of_the_glue(write, compiled):
    place = gpu_check.Place()
    sizes = [size for _, _, size in place.named(("route",)) if size.n < 1000]

    def checks():
        check_kernels.drawn_noise(write, sizes, "cpu", "triton")
        for size in {*place.glues, *glue.SIZES[:3]}:
            glue.step(glue.make(*size, "cpu"), "triton")()

    assert_compiled(keys_of(checks), compiled)


def test_the_checks_of_a_shelf(compiled, monkeypatch):
    # Nothing was routed, so nothing can be read by where it lies.
    monkeypatch.setattr(
        hp.SumAggregator, "from_rows",
        lambda self, outputs, routing: outputs[: len(routing.weights)] * routing.weights[:, :1],
    )  # fmt: skip
    shelf = check_shelf.SHELVES["ragged"]

    def checks():
        for own in (False, True):
            model = check_shelf.hub_of(shelf)
            model.executor = GroupedHeads("triton")
            place(model, "cpu", precompile.ROOM)
            next(check_shelf.trained(model, shelf, "cpu", own))

    found = keys_of(checks)
    assert {"_heads_forward", "_update"} <= {name for name, _ in found}
    assert_compiled(found, compiled)
