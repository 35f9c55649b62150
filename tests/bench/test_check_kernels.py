"""The bodies of bench.gpu_check's groups, on a CPU: kernels interpreted, graphs by stand-ins."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.bench import SMALL, TINY_GLUE, small_cases

from bench import check_kernels, check_operations, glue, inputs, operations
from bench.inputs import Size

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("name", check_operations.CASES)
def test_every_kernels_values_are_right(name, write, device):
    check_kernels.values(write, small_cases([name]), device.type, "triton")
    [row] = write
    assert row["ok"], row
    # Float32 sums of at most 24 terms; one rounding (4e-3) where images become bfloat16, which the
    # interpreter truncates.
    assert 0 <= row["error"] < (8e-3 if name == "images" else 2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_aggregate_in_half_precision_is_within_its_bound(dtype, write, device):
    case = ("aggregate", "aggregate", SMALL._replace(dtype=dtype))
    check_kernels.values(write, [case], device.type, "triton")
    assert [row["ok"] for row in write] == [True], write
    assert write[0]["name"] == f"aggregate 9,4,2,6 {'bf16' if dtype == 'bfloat16' else 'fp16'}"


def test_the_first_wrong_element_is_named(write, monkeypatch):
    make = check_operations.make

    def off(*arguments):
        operation = make(*arguments)

        def ours(backend, *leaves):
            [concat] = operation.ours("torch", *leaves)
            wrong = torch.zeros_like(concat)
            wrong[3, 2] = 1.5
            return (concat + wrong,)

        return replace(operation, ours=ours)

    monkeypatch.setattr(check_kernels, "make", off)
    expected = operations.truth(make("combine", SMALL, "cpu"))[0][3, 2].item()
    check_kernels.values(write, small_cases(["combine"]), "cpu", "torch")
    [row] = write
    assert not row["ok"]
    assert row["note"] == (
        f"concat[3, 2] got {expected + 1.5:.6g} expected {expected:.6g} (1 of 216 wrong)"
    )


def test_nan_an_error_and_a_wrong_plan_are_told(write, monkeypatch):
    right = [torch.ones(2, 3, dtype=torch.float64)]
    found = [torch.tensor([[1.0, 1.0, float("nan")], [1.0, 1.0, 1.0]])]
    assert check_kernels.first_wrong(["y"], found, right, 1e-5).startswith("y[0, 2] got nan")
    loss = [torch.tensor(2.0, dtype=torch.float64)]
    assert check_kernels.first_wrong(["loss"], [torch.tensor(3.0)], loss, 1e-5) == (
        "loss[] got 3 expected 2 (1 of 1 wrong)"
    )
    clean, noise, eps = inputs.Inputs(SMALL, "cpu").scores()
    routing = operations.HF.noisy_topk(clean, noise, 2, eps)
    moved = replace(routing, rows=routing.rows.flip(0))
    assert check_kernels.first_unequal(routing, routing) is None
    assert check_kernels.first_unequal(moved, routing).startswith(
        f"rows[0] got {int(routing.rows[-1])} expected {int(routing.rows[0])}"
    )

    def broken(*_):
        raise RuntimeError("an illegal memory access\nmore")

    monkeypatch.setattr(check_kernels, "make", broken)
    check_kernels.values(write, small_cases(["route"]), "cpu", "torch")
    assert write == [
        {"name": "route 9,4,2", "ok": False, "note": "RuntimeError: an illegal memory access"}
    ]


def test_drawn_noise_holds_what_any_noise_must(write, device):
    check_kernels.drawn_noise(write, [SMALL, Size(5, 3, 3, 1)], device.type, "triton")
    assert write.verdicts == [("draw 9,4,2", True), ("draw 5,3,3", True)]


def test_repeats_that_differ_are_seen(write, monkeypatch, device):
    cases = small_cases(["route", "aggregate+loss", "images"])
    check_kernels.repeats(write, cases, TINY_GLUE, device.type, "triton", times=2)
    assert [row["ok"] for row in write] == [True] * 4
    assert write[-1]["name"] == "repeat glue 9,4,2,5"
    del write[:]
    results = iter([torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 1e-7, 0.0])])
    monkeypatch.setattr(check_kernels, "_calls", lambda *_: [("x", lambda: [next(results)])])
    check_kernels.repeats(write, [], TINY_GLUE, "cpu", "torch", times=2)
    assert write == [{"name": "repeat x", "ok": False, "note": "other bits in one of 2 repeats"}]


def test_waits_are_named(write, monkeypatch):
    @contextlib.contextmanager
    def forbidden():
        waits.append(True)
        yield
        waits.pop()

    def call():
        if waits:
            raise RuntimeError("called a synchronizing CUDA operation")

    waits = []
    monkeypatch.setattr(check_kernels, "_calls", lambda *_: [("x", call), ("y", lambda: None)])
    check_kernels.no_waits(write, [], TINY_GLUE, "cpu", "torch", forbidden)
    assert write.verdicts == [("wait x", False), ("wait y", True)]
    assert "synchronizing" in write[0]["note"]


def test_a_replay_follows_its_inputs_or_is_named(write, device):
    def follows(function):  # stands for a graph
        return function

    check_kernels.replays(write, [TINY_GLUE], device.type, "triton", follows)
    assert write == [{"name": "replay glue 9,4,2,5", "ok": True, "text": "the eager bits"}]
    del write[:]

    def stays(function):
        results = function()
        return lambda: results

    check_kernels.replays(write, [TINY_GLUE], "cpu", "torch", stays)
    assert not write[0]["ok"]
    assert write[0]["note"].startswith("inputs 2: loss is not the eager one, by ")


def test_a_recorded_graph_leaves_its_results_where_they_are(monkeypatch):
    """With a stand-in for the capture, which runs the function again."""
    monkeypatch.setattr(
        check_kernels.timing, "capture", lambda prepare: SimpleNamespace(replay=prepare())
    )
    numbers = iter(range(9))
    replay = check_kernels.record_graph(lambda: [torch.tensor(next(numbers))])
    assert [replay()[0].item(), replay()[0].item()] == [0, 1]


def test_waits_are_errors_only_within(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: modes.append("waited"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(ValueError, match="inside"), check_kernels.waits_are_errors():
        raise ValueError("inside")
    assert modes == ["waited", "error", "default"]


def test_copied_inputs_are_the_others():
    given, other = (glue.make(*TINY_GLUE, "cpu", seed=seed) for seed in (1, 2))
    check_kernels.copy_inputs(given, other)
    assert torch.equal(torch.cat(given.outputs), torch.cat(other.outputs))
    assert torch.equal(given.clean, other.clean)


def test_every_kernel_has_the_papers_size_an_odd_and_a_large_one():
    for name, (kind, sizes) in check_operations.CASES.items():
        if kind == "masked_batch_norm":
            continue
        assert (48, 5, 2, 100) in {size[:4] for size in sizes}, name
        assert any(size.n % 2 and size.m % 2 and size.c % 2 for size in sizes), name
        assert max(size.n * size.k for size in sizes) >= 512, name


def test_every_dtype_layout_and_follower_of_batch_norm_is_checked():
    _, sizes = check_operations.CASES["batch norm"]
    assert {size.dtype for size in sizes} == {"float32", "float16", "bfloat16"}
    assert {size.norm.layout for size in sizes} == {"channels_last", "contiguous"}
    assert {size.norm.activation for size in sizes} == {None, *operations.ACTIVATIONS}
    assert {size.norm.residual for size in sizes} == {True, False}
    shapes = {(size.norm.valid, size.n, size.c, size.trailing) for size in sizes}
    assert {(20, 24, 256, (56, 56)), (20, 24, 2048, (7, 7)), (20, 24, 64, (112, 112))} <= shapes
    assert any(size.norm.valid == size.n for size in sizes)
    assert any(not size.trailing for size in sizes)
    assert any(size.c % 2 and size.positions % 2 for size in sizes)
