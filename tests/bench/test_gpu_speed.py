"""bench.gpu_speed without a GPU: its groups on a CPU, with small hubs and stand-ins for graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.bench import (
    PRESET,
    SMALL_NORM,
    SMALL_SHELF,
    Backend,
    linear_experts,
    run_here,
)

import hubpath_fast as hp
from bench import (
    gpu_speed,
    jsonl,
    predictions,
    speed_resident,
    speed_shelf,
    speed_step,
    step_growth,
    step_models,
    step_rows,
)
from bench.inputs import Size

ROWS = ("single 0", "captured single 0", "sequential", "threads", "dense", "reference", "glue",
        "generator")  # fmt: skip


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
        captures=Backend, resident=(lambda: linear_experts(range(6), 5, 16), 16, 7),
        shelf=SMALL_SHELF,
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
    for mix, ways in (("1:2", {"widen", "repeat"}), ("2:1", {"narrow", "and"})):
        found = rows["ceilings", f"copy {mix}"]
        assert found["rates"].keys() == ways
        assert found["bytes_per_second"] == max(found["rates"].values()) > 1e6
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
    for rate in (1.0, 0.9, 0.5):
        row = rows["resident", f"room for 4, {rate:.0%} hits"]
        assert row["images_per_second"] == pytest.approx(7 / row["mean"])
        assert (row["hit_rate"] == 1) == (row["bytes_in"] == 0) == (rate == 1)
    assert rows["resident", "all on the device"]["images_per_second"] > 0
    for name in speed_shelf.ROWS:
        row = rows["shelf", name]
        assert (row["experts"], row["calls"], row["rounds"]) == (5, speed_shelf.RECORDED, 3)
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
    assert sum(seconds.values()) == pytest.approx(300, abs=len(seconds) / 2)  # each is rounded
    assert list(seconds)[3:] == [
        "step", "graphs", "stream", "glue", "aggregate", "roof", "agent", "atari", "large",
        "resident", "shelf", "growth", "predict", "compiled",
    ]  # fmt: skip
    atari = next(line for line in listed.splitlines() if line.strip().startswith("atari"))
    rows = "single 0, captured single 0, sequential, streams, dense, reference"
    assert atari.endswith(rows)  # no graphs, which do not replay noisy networks
    preset, px = gpu_speed.Place().step  # the paper's
    assert (step_models.PRESETS[preset].n, step_models.PRESETS[preset].k, px) == (48, 2, 224)


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_device_has_no_times_of_comes_first(place, tmp_path, monkeypatch, capsys, whole):
    lines = [
        {"group": "step", "name": "dense"},
        {"group": "graphs", "name": "graphs, 1 lane"},
        {"group": "large", "name": "sequential", "ok": False},
        {"group": "roof", "name": "gather 9,3,2,5 float32 forward graph"},
        *[{"group": "roof", "name": "masked_batch_norm 6/9 float32 forward graph"}] * whole,
    ]
    shared = {"part": "speed", "ok": True, "date": "2026-11-27"}
    jsonl.write(tmp_path / "a-gpu-80gb" / "gpu.jsonl", [shared | line for line in lines])
    monkeypatch.setattr(gpu_speed.records, "gpu_name", lambda: "A GPU 80GB")
    only = ["--only", "step,roof,large", "--dry-run"]
    gpu_speed.main(only, replace(place, results=tmp_path))
    order = list(planned(capsys.readouterr().out))
    known = ["step", "graphs", *["roof"] * whole]
    assert order == [
        "machine", "compile", "ceilings", "stream", *["roof"] * (not whole), "large", *known
    ]  # fmt: skip


def test_experts_are_found_as_often_as_asked():
    for rate, misses in ((1.0, 0), (0.5, 60), (0.75, pytest.approx(30, abs=8))):
        batches = speed_resident.asked(rate, speed_resident.EXPERTS)
        there, missed = [], 0
        for _ in range(60):
            for expert in next(batches):
                missed += expert not in there and expert >= speed_resident.K
                there = [*[e for e in there if e != expert], expert][-speed_resident.ROOM :]
        assert missed == misses


def test_a_room_whose_predictions_differ_is_not_timed(writer):
    def other(*shape):
        def experts():
            layers = linear_experts(range(6), 5, 16)
            layers[1].register_forward_hook(lambda module, args, out: out + next(change))
            return layers

        change = iter([0.0, 1.0])
        return experts

    with pytest.raises(ValueError, match=r"not timed: experts \[0, 1\]: relative error"):
        speed_resident.measure(writer, other(), 16, 7, "cpu", 0.1)


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
