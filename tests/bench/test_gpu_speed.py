"""bench.gpu_speed without a GPU: its groups on a CPU, with small hubs and stand-ins for graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.bench import (
    PRESET,
    SMALL_NORM,
    Backend,
    Lanes,
    graphs_for_cpu,
    linear_experts,
    run_here,
)

import hubpath_fast as hp
from bench import (
    gpu_speed,
    jsonl,
    predictions,
    speed_step,
    step_counts,
    step_growth,
    step_models,
    step_rows,
    timing,
)
from bench.inputs import Size

ROWS = ("single 0", "captured single 0", "sequential", "threads", "dense", "reference", "glue",
        "generator")  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """As few rounds as there must be, however many seconds."""
    interleaved = timing.interleaved

    def least(functions, device="cpu", seconds=2.0, *rest, **options):
        return interleaved(functions, device, 0.0, *rest, **options)

    monkeypatch.setattr(timing, "interleaved", least)


@pytest.fixture
def lanes(monkeypatch):
    """The numbers of lanes that graphs were asked to run on; they are stand-ins."""
    graphs_for_cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, inputs: module)
    return Lanes.asked


@pytest.fixture
def place(monkeypatch):
    for name in ("homogeneous", "atari", "tiny"):
        monkeypatch.setitem(gpu_speed.PRESETS, name, PRESET)
    monkeypatch.setattr(gpu_speed, "THREADS", {1: 24})
    monkeypatch.setattr(step_growth, "timm_experts", linear_experts)
    return gpu_speed.Place(
        device="cpu", step=("homogeneous", 16), step_rows=ROWS, atari_rows=("single 0", "dense"),
        glues=((7, 3, 2, 4),), cpu=("tiny", 16), stream_steps=6,
        roof=(("gather", Size(9, 3, 2, 5)), ("masked_batch_norm", SMALL_NORM)),
        aggregate=(Size(9, 3, 2, 5),), large=(30, 2), large_rows=("sequential", "graphs, 8 lanes"),
        growth=((8, 4, 2), (64, 64, 2)), batches=(1, 5), compiled=((7, 3, 2, 4),),
        captures=Backend,
    )  # fmt: skip


def test_every_part_is_measured_on_a_cpu(place, lanes, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESET.stride, 84, 4)  # atari's pixels
    make, compiled = step_rows.make, []
    monkeypatch.setattr(  # experts of 16 pixels take images of 84 by a part of them
        step_rows, "make", lambda preset, px, *rest, **options: make(preset, 16, *rest, **options)
    )
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    arguments = ["--only", ",".join(gpu_speed.PARTS), "--out", str(tmp_path), "--seconds", "9999"]
    here = run_here("machine", "compile")
    assert gpu_speed.main(arguments, place, here) == 0, capsys.readouterr().out
    rows = {(row["group"], row["name"]): row for row in jsonl.read(tmp_path / "speed.jsonl")}
    copy = rows["ceilings", "copy"]
    assert copy["bytes_per_second"] == max(copy["rates"].values()) > 1e6
    assert copy["text"].split()[-1] in ("copy_", "kernel")
    assert rows["ceilings", "bf16 product"]["flops_per_second"] > 1e6
    for name in ROWS:
        row = rows["step", name]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert (row["rounds"], row["calls"]) == (3, 4)  # the last line of a row, not its first
        assert row["to_k_single"] == pytest.approx(
            row["p50"] / (2 * rows["step", "single 0"]["p50"])
        )
        assert row["to_k_captured"] > 0
        assert (row["N"], row["M"], row["K"], row["px"]) == (24, 3, 2, 16)
    for count in (1, 2, 8):
        row = rows["graphs", f"graphs, {count} lane{'s' * (count > 1)}"]
        assert row["misses_a_cycle"] == 0
        assert row["graphs"] >= 3
        assert row["eager"] == {}
    assert sorted(set(lanes)) == [1, 2, 8]
    for stream in ("balanced", "drifting"):
        row = rows["stream", stream]
        assert row["rounds"] == 6
        assert 0 < row["p50"] <= row["p95"] <= row["slowest"]
        assert (row["hits"] + row["misses"], row["eager"]) == (3 * 6, {})
        assert row["captures_ahead"] >= 3
        assert 0 <= row["padding"] < 0.5
    assert rows["glue", "7,3,2,4 torch eager"]["speedup"] > 0
    roof = rows["roof", "gather 9,3,2,5 float32 backward eager"]
    assert roof["share_of_copy"] == pytest.approx(
        roof["fewest_bytes"] / roof["p50"] / copy["bytes_per_second"]
    )
    fused, torchs = (
        rows["roof", f"masked_batch_norm {SMALL_NORM.numbers} float32{whose} forward eager"]
        for whose in ("", " reference")
    )
    assert fused["fewest_bytes"] == torchs["fewest_bytes"]
    assert rows["atari", "dense"]["to_k_single"] > 0
    for method in ("scratch", "hub"):
        for way in ("eager", "captured"):
            row = rows["agent", f"{method} {way}"]
            assert row["steps_per_second"] == pytest.approx(1 / row["p50"])
    for row in ("torch", "dense", "reference"):
        assert rows["aggregate", f"aggregate 9,3,2,5 float32 {row} eager"]["p50"] > 0
    for name in place.large_rows:
        row = rows["large", name]
        assert (row["N"], row["calls"]) == (30, 2)  # a cycle of two routings
    assert rows["compiled", "7,3,2,4 compiled eager"]["speedup"] > 0
    assert len(compiled) == 1
    for executor in ("sequential", "graphs"):
        small, large = (rows["growth", f"{executor}, M={m}"] for m in (4, 64))
        grown = rows["growth", f"{executor}, growth"]
        ratio = {key: large[key]["p50"] / small[key]["p50"] for key in ("step", "experts alone")}
        assert grown["growth_4_to_64"] == pytest.approx(ratio)
        beyond = ratio["step"] / ratio["experts alone"]
        assert grown["growth_beyond_smaller_groups"] == pytest.approx(beyond)
        for n in (1, 5):
            row, single = (rows["predict", f"{name}, N={n}"] for name in (executor, "single 0"))
            assert row["to_single"] == pytest.approx(row["p50"] / single["p50"])
            assert row["calls"] == 1
    for name in ("reference", "sequential", "threads"):
        assert rows["cpu 1", name]["p50"] > 0
    assert all(row["device"] for (_, name), row in rows.items() if name != "group")
    text = capsys.readouterr().out
    text = text[text.index("0 failed, ") :]  # before it, what groups print into their log
    assert len(text) < 5800
    assert "step: sequential ok " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.jsonl"]


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


def test_a_glue_that_breaks_costs_its_own_size(place, writer, monkeypatch):
    measure = gpu_speed.glue.measure

    def breaks(size, *arguments):
        rows = measure(size, *arguments)
        yield next(rows)
        if size[0] == 7:
            raise RuntimeError("an illegal memory access")
        yield from rows

    monkeypatch.setattr(gpu_speed.glue, "measure", breaks)
    gpu_speed.glues(place, ((7, 3, 2, 4), (9, 3, 2, 4)), False, writer, 0.1)
    assert [(row["name"], row["ok"]) for row in rows_of(writer)] == [
        ("7,3,2,4 reference eager", True), ("7,3,2,4", False),
        ("9,3,2,4 reference eager", True), ("9,3,2,4 torch eager", True),
    ]  # fmt: skip


def test_the_glue_is_profiled_after_all_sizes_are_timed(place, writer, monkeypatch):
    asked, measure = [], gpu_speed.glue.measure
    monkeypatch.setattr(
        gpu_speed.glue, "measure", lambda size, *rest: asked.append("timed") or measure(size, *rest)
    )
    monkeypatch.setattr(
        speed_step, "profiled", lambda *_, **__: asked.append("profiled") or {"launches": 9.0}
    )
    gpu_speed.glues(place, ((7, 3, 2, 4), (9, 3, 2, 4)), False, writer, 0.1)
    assert asked == ["timed", "timed", "profiled", "profiled"]
    rows = {row["name"]: row for row in rows_of(writer)}
    assert rows["7,3,2,4 torch eager"]["launches"] == 9.0
    assert rows["7,3,2,4 torch eager"]["p50"] > 0


def test_predictions_go_to_different_experts_and_wrong_ones_are_told(writer, quick, monkeypatch):
    setting = step_rows.make(PRESET, 16, "cpu")
    plain = step_rows.hub(setting).eval()
    assert plain.route(setting.x).counts() == [24, 24, 0]
    predictions.spread(setting)
    assert min(step_rows.hub(setting).eval().route(setting.x).counts()) > 0

    run = step_rows.predict
    monkeypatch.setattr(
        step_rows, "predict",
        lambda setting, model, n: (lambda call: lambda: call() * 1.01)(run(setting, model, n))
        if getattr(model, "executor", "") == "threads" else run(setting, model, n),
    )  # fmt: skip
    rows = ("sequential", "threads", "streams")
    predictions.measure(writer, PRESET, 16, rows, (4,), "cpu", 1.0)
    notes = {row["name"]: row["note"] for row in rows_of(writer) if not row["ok"]}
    assert notes["threads, N=4"] == "not timed: it differs from the reference"
    assert "executor: 'streams' needs CUDA" in notes["streams, N=4"]
    assert list(notes) == ["threads, N=4", "streams, N=4"]


def test_a_step_that_is_wrong_is_not_one_of_growth(place, writer, quick, monkeypatch):
    join = hp.executors.sequential.join
    monkeypatch.setattr(hp.executors.sequential, "join", lambda *args: join(*args) * 1.01)
    gpu_speed.growth(replace(place, executors=("sequential",)), writer, 1.0)
    assert [(row["name"], row.get("note")) for row in rows_of(writer)] == [
        (f"sequential, M={m}", "ValueError: not timed: relative error 1.0e-02 above 2e-03")
        for m in (4, 64)
    ]  # fmt: skip


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


def planned(listed):
    """Seconds by group, as a dry run lists them."""
    pairs = [line.split("planned") for line in listed.splitlines()]
    return {name.strip(): int(rest.split()[0]) for name, rest in pairs}


def test_a_dry_run_keeps_to_the_seconds_and_names_the_rows(capsys):
    assert gpu_speed.main(["--dry-run"]) == 0
    listed = capsys.readouterr().out
    for word in ("captured single 0", "graphs, 8 lanes", "graphs, 1 lane\n", "dense", "reference",
                 "(48, 5, 2, 100)", "noisy_topk 262144", "combine 262144", "N = 256",
                 "240 each: balanced, drifting"):  # fmt: skip
        assert word in listed
    seconds = planned(listed)
    assert 280 < sum(seconds.values()) <= 300
    assert list(seconds)[3:] == [
        "step", "graphs", "stream", "glue", "aggregate", "roof", "agent", "atari", "large",
        "growth", "predict", "compiled",
    ]  # fmt: skip
    atari = next(line for line in listed.splitlines() if line.strip().startswith("atari"))
    rows = "single 0, captured single 0, sequential, streams, dense, reference"
    assert atari.endswith(rows)  # no graphs, which do not replay noisy networks
    preset, px = gpu_speed.Place().step  # the paper's
    assert (step_models.PRESETS[preset].n, step_models.PRESETS[preset].k, px) == (48, 2, 224)


FIRST = {"machine": 6, "compile": 14, "ceilings": 4}


@pytest.mark.parametrize(
    ("cores", "only", "seconds", "expected"),
    [
        (4, "compiled,large", "300", FIRST | {"large": 30, "compiled": 20}),
        (4, "cpu", "300", {"cpu 1": 24, "cpu 2": 24, "cpu 4": 16}),
        (16, "cpu", "48", {"cpu 1": 12, "cpu 2": 12, "cpu 4": 8, "cpu 8": 8, "cpu 16": 8}),
    ],
)
def test_parts_are_planned_for_the_cores_and_the_seconds(
    monkeypatch, capsys, cores, only, seconds, expected
):
    monkeypatch.setattr(gpu_speed.precompile, "cores", lambda: cores)
    assert gpu_speed.main(["--only", only, "--seconds", seconds, "--dry-run"]) == 0
    assert planned(capsys.readouterr().out) == expected
