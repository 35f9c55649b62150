"""The executors' checks on a CPU, with a stand-in for what captures."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.bench import FAILING, make_hub

import hubpath_fast as hp
from bench import check_executors, step_models


def test_executors_that_agree_are_ok(write):
    check_executors.agreement(write, ["graphs", "threads"], "cpu", make_hub, steps=8)
    assert [row["name"] for row in write] == [
        f"{executor} {network} {precision}"
        for network in ("BatchNorm", "LayerNorm")
        for precision in ("float32", "bf16")
        for executor in ("graphs", "threads")
    ]
    assert write.failed == []


def test_a_wrong_executor_is_named(write, monkeypatch):
    join = hp.executors.graphs.executor.join
    monkeypatch.setattr(hp.executors.graphs.executor, "join", lambda *args: join(*args) * 1.3)
    check_executors.agreement(write, ["graphs"], "cpu", make_hub, steps=8)
    assert not any(row["ok"] for row in write)
    assert write[0]["note"].startswith("step 0: prediction differ by ")


def test_graphs_that_replay_nothing_are_no_success(write):
    check_executors.agreement(write, ["graphs"], "cpu", make_hub, steps=1)
    assert [row["note"] for row in write] == ["no graph was replayed: nothing was captured"] * 4


def test_an_error_is_a_line_and_the_others_go_on(write):
    check_executors.agreement(write, ["streams", "threads"], "cpu", make_hub, steps=1)
    assert [row["ok"] for row in write] == [False, True] * 4
    assert "executor: 'streams' needs CUDA" in write[0]["note"]


def test_dropout_is_checked_by_what_it_leaves(write, monkeypatch):
    check_executors.dropout(write, ["sequential", "graphs"], "cpu", make_hub, steps=8)
    assert write.verdicts == [("sequential dropout", True), ("graphs dropout", True)]
    del write[:]
    keep = torch.arange(256) % 2 * 2.0
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x * keep)
    check_executors.dropout(write, ["sequential"], "cpu", make_hub, steps=2)
    [row] = write
    assert row["note"] == "step 1, not so: other ones than before"


def test_after_failed_captures_all_is_as_before(write):
    check_executors.capture_failures(write, "cpu", make_hub, **FAILING)
    assert [row["name"] for row in write] == ["after a failed capture", "draws", "a good capture"]
    assert write.failed == []


@pytest.mark.parametrize(
    ("failures", "wrong"),
    [
        (1, "a note names the failed capture, once"),
        (9, "no note does after the second; what failed twice is eager"),
    ],
)
def test_a_capture_is_to_fail_twice_before_its_expert_is_eager(write, failures, wrong):
    """As the executor's default says; here another number does."""
    make = partial(make_hub, max_failures=failures)
    check_executors.capture_failures(write, "cpu", make, **FAILING)
    assert [row["note"] for row in write.failed] == [f"not so: {wrong}"]


@pytest.mark.parametrize(("after", "back"), [(100, True), (90, True), (116, False)])
def test_memory_is_back_where_no_more_of_it_is_in_use(monkeypatch, after, back):
    """Less may be: what others had marked before is given back, too."""
    bytes_in_use = iter([100, after])
    fakes = {
        "memory_stats": lambda: {"active_bytes.all.current": next(bytes_in_use)},
        "Stream": object, "synchronize": lambda: None,
    }  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    block = type("Block", (), {"record_stream": lambda self, stream: None})
    monkeypatch.setattr(torch, "empty", lambda *_, **__: block())
    assert check_executors._blocks_return() == back


def test_an_error_after_a_failed_capture_hides_no_other_check(write, monkeypatch):
    def broken(*_):
        raise RuntimeError("Offset increment outside graph capture")

    monkeypatch.setattr(check_executors, "step", broken)
    check_executors.capture_failures(write, "cpu", make_hub, 2)
    assert write.verdicts == [
        ("after a failed capture", False), ("draws", True), ("a good capture", False),
    ]  # fmt: skip
    assert write[0]["note"] == "RuntimeError: Offset increment outside graph capture"


def test_draws_that_are_broken_by_a_failed_capture_are_seen(write, monkeypatch):
    monkeypatch.setattr(check_executors.torch, "rand", lambda *size, device: torch.zeros(size))
    assert check_executors._draws("cpu") == {
        "torch draws again": False,
        "routing draws again": True,
    }


def test_recorded_noise_routes_the_same_way_each_time():
    first, again = (step_models.recorded_noise(48, 5, 2, 3) for _ in range(2))
    assert all(map(torch.equal, first, again))
    zeros, counts = torch.zeros(48, 5), []
    for noise in first:
        routings = [
            hp.functional.noisy_topk(zeros, zeros, 2, n)
            for n in (noise, noise + 0.02 * torch.sin(torch.arange(5.0)))
        ]  # a little noise more changes nothing
        assert torch.equal(routings[0].experts.sort()[0], routings[1].experts.sort()[0])
        counts.append(routings[0].counts())
    assert len({tuple(c) for c in counts}) == 3
    assert step_models.recorded_noise(4, 2, 2, 1)[0].shape == (4, 2)  # K = M: nothing to be close
