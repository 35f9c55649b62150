"""Single steps on routings that change, on a CPU with stand-ins for graphs."""

from __future__ import annotations

import pytest
import torch
from support.bench import PRESET, graphs_for_cpu

from bench import routing_traces, step_rows, step_stream

STEPS = 12


@pytest.fixture
def seconds(monkeypatch):
    """What steps take, one after another; 1 for all beyond."""
    found = []
    monkeypatch.setattr(
        step_stream, "_seconds", lambda step, device: [step(), found.pop(0) if found else 1.0][1]
    )
    return found


@pytest.fixture(autouse=True)
def graphs_are_stand_ins(monkeypatch):
    graphs_for_cpu(monkeypatch)


def measured(write, steps=STEPS, seconds=100.0):
    step_stream.measure(write, PRESET, 16, "cpu", seconds, steps)
    return {row["name"]: row for row in write}


def test_slow_steps_show_in_the_p95_and_not_in_the_median(write, seconds):
    seconds += [1.0] * 11 + [9.0]
    rows = measured(write)
    assert list(rows) == ["balanced", "drifting"]
    slow, even = rows.values()
    assert (slow["p50"], slow["slowest"], slow["rounds"]) == (1.0, 9.0, STEPS)
    assert slow["p95"] == pytest.approx(1 + 8 * 0.45)  # 0.95 of 11 gaps: 0.45 into the last
    assert (even["p95"], even["slowest"]) == (1.0, 1.0)
    assert slow["text"].startswith("12 steps: median 1000.00 ms, p95 4.60x, slowest 9000.0 ms; ")


def test_what_the_executor_did_is_counted_from_the_first_step_that_counts(write, seconds):
    for row in measured(write).values():
        assert row["hits"] + row["misses"] == 3 * STEPS
        assert row["misses"] <= 2
        assert row["captures_ahead"] >= 3
        assert 0 < row["padding"] < 0.5
        assert (row["N"], row["M"], row["K"], row["px"]) == (24, 3, 2, 16)


def test_a_group_without_a_graph_is_a_miss(write, seconds, monkeypatch):
    """Nothing is captured ahead, and the first groups run eagerly, before those that count."""
    for name in ("capture_ahead", "replays_differ"):
        monkeypatch.setattr(step_rows, name, lambda setting, model: None)
    monkeypatch.setattr(step_stream, "FIRST", 0)
    row = measured(write)["balanced"]
    assert row["captures_ahead"] == 0
    assert row["misses"] >= 2 * 3
    assert row["captures"] >= 3


def test_streams_ask_for_the_experts_of_the_traces_and_never_twice_for_the_same(write):
    setting = step_rows.make(PRESET, 16, "cpu")
    zeros = torch.zeros(24, 3)
    for kind in step_stream.STREAMS:
        trace = routing_traces.draw(kind, steps=20, n=24, k=2, m=3)
        route = step_rows.hp.functional.noisy_topk
        found = [
            route(zeros, zeros, 2, noise).counts()
            for noise in step_stream.noises(setting, kind, 20)
        ]
        assert found == trace.counts
        assert len(set(map(tuple, found))) > 10


def test_fewer_steps_are_made_where_time_does_not_do_for_all(write, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(step_stream.time, "monotonic", lambda: next(clock))
    rows = measured(write, steps=500, seconds=40.0)
    assert all(2 <= row["rounds"] < 40 for row in rows.values())


def test_graphs_that_are_wrong_are_not_timed(write, monkeypatch):
    monkeypatch.setattr(step_rows, "replays_differ", lambda setting, model: "replays: off")
    with pytest.raises(ValueError, match="not timed: replays: off"):
        measured(write)


def test_a_stream_that_breaks_costs_itself_only(write, seconds, monkeypatch):
    noises = step_stream.noises

    def broken(setting, kind, steps):
        if kind == "balanced":
            raise RuntimeError("out of memory")
        return noises(setting, kind, steps)

    monkeypatch.setattr(step_stream, "noises", broken)
    rows = measured(write)
    assert rows["balanced"]["note"] == "RuntimeError: out of memory"
    assert rows["drifting"]["ok"]
