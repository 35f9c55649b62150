"""Timing helpers: what is refused, how rounds interleave, what quantiles say."""

from __future__ import annotations

import gc
import subprocess
import weakref
from types import SimpleNamespace

import pytest
import torch

from bench import (
    counting,
    glue,
    gpu_check,
    gpu_speed,
    jsonl,
    ops,
    precompile,
    records,
    step,
    timing,
)


@pytest.mark.parametrize(
    "call",
    [
        lambda: timing.interleaved({"a": int}),
        lambda: ops.main([]),
        lambda: glue.main([]),
        lambda: step.main(["--preset", "tiny", "--quick"]),
        lambda: gpu_speed.main(["--dry-run"]),
        lambda: gpu_check.machine(gpu_check.Place(), None, 1.0),
        lambda: precompile.compile_jobs([], 90),
    ],
)
def test_the_interpreter_is_refused(monkeypatch, call):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected compiled"):
        call()


def test_rounds_run_every_function_in_changing_order():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = timing.interleaved(functions, seconds=0, min_rounds=6, calls=1)
    assert all(times.rounds == 6 and times.calls == 1 for times in found.values())
    rounds = [calls[i : i + 3] for i in range(3, len(calls), 3)]  # after warm-up
    assert len(rounds) == 6
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_short_calls_are_repeated_within_a_sample_and_time_is_of_one(clock):
    seconds = {"short": 2.0**-13, "long": 2.0**-4, "tiny": 2.0**-30}  # their sums are exact
    functions = {name: clock.takes(duration) for name, duration in seconds.items()}
    found = timing.interleaved(functions, seconds=0, min_rounds=5, clock=clock)
    assert {name: times.p50 for name, times in found.items()} == seconds
    # As many as SAMPLE_SECONDS take: 2^-13 goes eight times into a millisecond. A thousand at most.
    assert {name: times.calls for name, times in found.items()} == {
        "short": 8, "long": 1, "tiny": 1000,
    }  # fmt: skip


def test_rounds_go_on_until_the_seconds_are_spent(clock):
    found = timing.interleaved({"a": clock.takes(1.0)}, seconds=6.5, clock=clock, calls=1)
    assert found["a"].rounds == 7
    found = timing.interleaved({"a": clock.takes(1.0)}, seconds=1e3, max_rounds=9, clock=clock)
    assert found["a"].rounds == 9


def test_a_sample_is_of_so_many_calls_without_a_wait_between_them(monkeypatch):
    events = []
    monkeypatch.setattr(timing, "synchronize", lambda device: events.append("wait"))
    found = timing.interleaved(
        {"a": lambda: events.append("call")}, seconds=0, min_rounds=2, calls=4
    )
    assert events == ["call", *2 * ["wait", *4 * ["call"], "wait"]]
    assert (found["a"].rounds, found["a"].calls) == (2, 4)


def test_quantiles():
    times = timing.Times.of([float(i) for i in range(11)])
    assert (times.p20, times.p50, times.p80, times.best, times.rounds) == (2, 5, 8, 0, 11)
    assert timing.Times.of([3.0]).p80 == 3.0


def test_bytes_are_counted_by_operator():
    x, y = torch.ones(100), torch.ones(100)
    assert counting.moved_bytes(lambda: x + y) == 3 * 400
    assert counting.moved_bytes(lambda: x.view(10, 10).t()) == 0
    assert counting.moved_bytes(lambda: x.add_(1)) == 2 * 400 - 400  # in place: written only
    assert counting.moved_bytes(lambda: torch.ones(1).expand(100) + x) == 4 + 4 + 800


def test_rows_carry_where_and_when():
    found = records.environment("cpu")
    assert {"device", "torch", "triton", "python", "threads", "commit", "date"} <= found.keys()
    assert found["threads"] == torch.get_num_threads()


def test_lines_are_added_and_torn_ones_are_passed_over(tmp_path):
    path = tmp_path / "a" / "rows.jsonl"
    assert jsonl.read(path) == []
    jsonl.write(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": 1.5, "b": "to')  # who wrote it was killed
    assert jsonl.read(path) == [{"a": 1}]
    jsonl.write(path, [{"a": 2.5, "b": None}])
    assert jsonl.read(path) == [{"a": 1}, {"a": 2.5, "b": None}]


def test_the_commit_is_the_environments_or_gits(monkeypatch):
    def git(*command):
        return "0123456789ab" if "rev-parse" in command else ""

    def no_git(*command):
        raise subprocess.CalledProcessError(128, command)

    # A copy may be a repository of its own, which knows an older commit.
    for value, run, expected in (
        ("abc123", git, "abc123"), ("abc123", no_git, "abc123"),
        (None, git, "0123456789ab"), (None, no_git, "unknown"),
    ):  # fmt: skip
        monkeypatch.setattr(records, "_run", run)
        records.commit.cache_clear()
        monkeypatch.delenv("HUBPATH_COMMIT", raising=False)
        if value:
            monkeypatch.setenv("HUBPATH_COMMIT", value)
        assert records.commit() == expected
    records.commit.cache_clear()


def test_a_capture_warms_up_on_its_stream_and_replays_are_timed(cuda):
    calls = []

    def prepare():
        calls.append("prepared")
        return lambda: calls.append("called")

    graph = timing.capture(prepare)
    assert calls == ["prepared", *["called"] * 4]  # three to warm up, one captured
    found = timing.replayed({"graph": graph}, seconds=0, min_rounds=3)["graph"]
    assert found == timing.Times.of([cuda] * 3)


def test_what_a_graph_reads_lives_as_long_as_the_graph(cuda):
    """A graph knows addresses: memory that was given back it would read, whosever it is by then."""
    read = []

    def prepare():
        leaf = torch.ones(3, requires_grad=True)
        kept = (2 * leaf).sum()  # a forward pass whose backward is captured
        read.extend(map(weakref.ref, (leaf, kept)))
        return lambda: torch.autograd.grad(kept, leaf, retain_graph=True)

    graph = timing.capture(prepare)
    gc.collect()
    assert all(ref() is not None for ref in read)
    replay = graph.replay
    del graph
    gc.collect()
    assert all(ref() is not None for ref in read)  # who keeps the replay keeps it all
    del replay
    gc.collect()
    assert all(ref() is None for ref in read)


def test_rates_are_bytes_and_operations_of_a_second():
    def measure(functions, device, captured):
        return {name: seconds[name] for name in functions}

    seconds, moved = {"copy_": 0.5, "kernel": 0.25, "product": 0.5}, 2 * (1 << 20)
    options = {"megabytes": 1, "measure": measure}
    assert timing.copy_rates("cpu", **options) == {"copy_": moved / 0.5, "kernel": moved / 0.25}
    assert timing.copy_bandwidth("cpu", **options) == moved / 0.25  # the fastest
    assert timing.product_rate("cpu", size=64, measure=measure) == 2 * 64**3 / 0.5


def test_what_is_measured_as_a_copy_moves_each_byte_once():
    moved = {}

    def measure(functions, device, captured):
        moved.update({name: counting.moved_bytes(call) for name, call in functions.items()})
        return moved

    timing.copy_rates("cpu", megabytes=1, measure=measure)
    assert moved["kernel"] == 2 << 20
    assert moved["copy_"] >= 1 << 20
    timing.mixed_rates("cpu", megabytes=1, measure=measure)
    assert {way: moved[way] >> 20 for way in ("widen", "repeat", "narrow", "and")} == {
        "widen": 3, "repeat": 3, "narrow": 3, "and": 3
    }  # fmt: skip


def test_ceilings_are_of_many_in_a_row_and_a_copy_is_not_captured(cuda, clock, monkeypatch):
    captured, seconds = [], {"copy_": 2.0**-20, "kernel": 2.0**-9}
    monkeypatch.setattr(timing, "capture", lambda prepare: captured.append(prepare()) or
                        SimpleNamespace(replay=clock.takes(2.0**-8)))  # fmt: skip
    functions = {name: clock.takes(duration) for name, duration in seconds.items()}
    found = timing.seconds_in_a_row(functions, "cuda", ("kernel",), clock)
    assert found == {"copy_": seconds["copy_"], "kernel": 2.0**-8 / timing.CALLS}  # of a graph
    [graph] = captured
    before = clock()
    graph()
    assert clock() - before == timing.CALLS * seconds["kernel"]


def test_a_share_above_the_copy_says_so():
    assert timing.say_share(0.994) == "99% of copy"
    assert timing.say_share(1.56) == "156% of copy (above it)"


def test_samples_are_kept_in_the_order_of_the_rounds(cuda):
    graphs, kept = {name: timing.Captured(SimpleNamespace(replay=int), int) for name in "ab"}, {}
    found = timing.replayed(graphs, 0.0, min_rounds=4, kept=kept)
    assert kept == {"a": [cuda] * 4, "b": [cuda] * 4}
    assert found["a"].rounds == 4
