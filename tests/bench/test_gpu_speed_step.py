"""bench.speed_step without a GPU: steps on a CPU, with small hubs and stand-ins for graphs."""

from __future__ import annotations

import pytest
from support.bench import PRESET, Backend, Lanes

from bench import jsonl, speed_step, step_counts, step_rows, timing


def rows_of(writer):
    return jsonl.read(writer.files.rows)


def test_a_wrong_row_is_told_and_the_others_are_timed(writer, monkeypatch):
    check = step_rows.check
    monkeypatch.setattr(
        step_rows, "check",
        lambda setting, model: "prediction: off" if model.executor == "threads" else
        check(setting, model),
    )  # fmt: skip
    speed_step.measure(writer, PRESET, 16, ("threads", "streams", "sequential"), "cpu", 0.1)
    rows = rows_of(writer)
    assert [(row["name"], row.get("note")) for row in rows if not row["ok"]] == [
        ("threads", "ValueError: not timed: prediction: off"),
        ("streams", "ValueError: executor: 'streams' needs CUDA, but the input is on cpu; move the "
                    'model and its input there, or use executor="auto"'),
    ]  # fmt: skip
    assert [row["name"] for row in rows if row["ok"]] == ["sequential", "sequential"]


def test_a_row_is_on_disk_before_all_are_timed(writer, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "interleaved", killed)
    with pytest.raises(KeyboardInterrupt):
        speed_step.measure(writer, PRESET, 16, ("single 0", "sequential"), "cpu", 100.0)
    rows = rows_of(writer)
    assert [row["name"] for row in rows] == ["single 0", "sequential"]
    assert all(row["p50"] > 0 and row["rounds"] == 1 for row in rows)


@pytest.mark.parametrize(
    ("seconds", "device", "rounds"),
    # Cycles of four steps: three of them fit into 0.9 of the seconds on a CPU, into half on a GPU.
    [(13.0, "cpu", 1), (14.0, "cpu", 3), (23.0, "cuda", 1), (25.0, "cuda", 3)],
)
def test_rounds_fit_the_seconds(writer, on_a_gpu, monkeypatch, seconds, device, rounds):
    asked = []

    def interleaved(functions, device, left, min_rounds, calls):
        asked.append((min_rounds, calls))
        return {name: timing.Times.of([1.0] * min_rounds, calls) for name in functions}

    def begin(write, row, setting):
        row.values |= vars(timing.Times.of([1.0], len(setting.noise)))
        write(row.name, **row.values)

    setting = step_rows.make(PRESET, 16)
    setting.noise *= 2
    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(speed_step, "_begin", begin)
    monkeypatch.setattr(speed_step.time, "monotonic", lambda: 0.0)
    speed_step.measure(writer, PRESET, 16, ("single 0",), device, seconds)
    row = rows_of(writer)[-1]
    assert asked == ([] if rounds == 1 else [(3, 4)])
    assert (row["rounds"], row["calls"]) == (rounds, 4)
    assert row["text"].startswith("1000.00 ms" + " (one cycle)" * (rounds == 1))


def test_the_device_is_not_waited_for_within_a_cycle(writer, quick, monkeypatch):
    events, step = [], step_rows.single_step
    monkeypatch.setattr(timing, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(
        step_rows, "single_step",
        lambda *a: (lambda run: lambda: events.append("step") or run())(step(*a)),
    )  # fmt: skip
    speed_step.measure(writer, PRESET, 16, ("single 0",), "cpu", 100.0)
    runs = "".join("." if event == "step" else "|" for event in events).split("|")
    assert [len(run) for run in runs if run] == [4, 4, 1, *[4] * speed_step.LEAST_CYCLES]


def test_graphs_that_replay_something_else_are_not_timed(writer, lanes, monkeypatch):
    capture = Backend.capture

    def stale(self, function, pool):
        calls = []

        def changing():
            calls.append(function())
            return calls[0] if len(calls) == 1 else [t if t is None else t * 1.5 for t in calls[-1]]

        return capture(self, changing, pool)

    monkeypatch.setattr(Backend, "capture", stale)
    speed_step.measure(writer, PRESET, 16, ("graphs, 2 lanes",), "cpu", 0.1)
    [row] = rows_of(writer)
    assert "not timed: replays: prediction: relative error" in row["note"]


def test_graphs_that_would_need_too_much_memory_are_not_timed(writer, lanes, monkeypatch):
    monkeypatch.setattr(Lanes, "budget", lambda self: 1000)
    speed_step.measure(writer, PRESET, 16, ("graphs, 2 lanes",), "cpu", 0.1)
    [row] = rows_of(writer)
    assert "not timed: no graph was replayed: the experts' graphs would need some" in row["note"]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Whole steps that are measured on "cuda", on a CPU; what was asked of the device, in order."""
    asked = []
    found = step_counts.DeviceTime(2e-3, 3e-3, 55.0, (("conv", 1e-3, 4.0),))
    monkeypatch.setattr(
        speed_step, "device_time", lambda function, device, calls: asked.append("profile") or found
    )
    monkeypatch.setattr(
        speed_step, "peak_memory", lambda function, device: asked.append("memory") or 5
    )
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    setting = step_rows.make(PRESET, 16, "cpu", recorded=2)
    monkeypatch.setattr(step_rows, "make", lambda *_, **__: setting)
    return asked


def test_what_the_device_does_is_asked_once_all_is_timed(writer, on_a_gpu):
    speed_step.measure(writer, PRESET, 16, ("single 0", "dense"), "cuda", 0.1)
    assert on_a_gpu == ["memory"] * 2 + ["profile"] * 2  # a profiler may stay attached
    row = rows_of(writer)[-1]
    assert (row["busy"], row["launches"], row["peak_memory"]) == (2e-3, 55.0, 5)
    assert row["dearest"] == [["conv", 1e-3, 4.0]]
    assert row["text"].endswith("busy 2.00, 55 launches")


@pytest.mark.parametrize("problem", ["it fails", "it sees nothing"])
def test_a_profile_that_is_none_costs_no_time_that_was_measured(
    writer, on_a_gpu, quick, monkeypatch, problem
):
    def no_profile(function, device, calls):
        if problem == "it fails":
            raise RuntimeError("CUPTI_ERROR_MULTIPLE_SUBSCRIBERS")

    monkeypatch.setattr(speed_step, "device_time", no_profile)
    speed_step.measure(writer, PRESET, 16, ("single 0", "dense"), "cuda", 100.0)
    rows = {row["name"]: row for row in rows_of(writer)}  # the last of each
    assert list(rows) == ["single 0", "dense"]
    for row in rows.values():
        assert row["ok"]
        assert row["p50"] > 0
        assert (row["rounds"], row["calls"]) == (3, 2)
        assert "busy" not in row
        assert "not profiled: " in row["text"]


def test_memory_of_graphs_counts_in_the_peak(on_a_gpu):
    row = speed_step.Row("graphs, 1 lane", int, values={"graph_memory": 100})
    assert speed_step._peak(row, "cuda") == {"peak_memory": 105}


@pytest.mark.parametrize(
    ("build", "make_step"),
    [(step_rows.hub, step_rows.hub_step), (step_rows.reference_hub, step_rows.reference_step)],
)
def test_recorded_routings_are_gone_through_in_turn(build, make_step):
    setting, seen = step_rows.make(PRESET, 16, "cpu", recorded=3), []
    model = build(setting)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    step = make_step(setting, model)
    for _ in range(4):
        step()
    assert [id(eps) for eps in seen] == [id(setting.noise[i % 3]) for i in range(4)]
    assert next(step_rows.make(PRESET, 16, "cpu").noises()) is None
