"""The plumbing of the GPU suite with a fake runner: no GPU is needed, and none is used."""

from __future__ import annotations

import json
import sys

import pytest

from bench import gpu_suite, jsonl, step
from bench.gpu_suite import Section

TIMED = {"direction": "both", "N": 48, "M": 5, "K": 2, "C": 100, "mode": "graph", "p50": 2e-5,
         "speedup": 12.5, "row": "triton"}  # fmt: skip


def fake(out, statuses):
    def runner(section: Section, limit: float, log) -> int:
        log.write_text(section.name)
        if section.name == "glue":
            jsonl.write(out / "glue.jsonl", [{"benchmark": "glue", **TIMED}])
        if section.name == "tests":
            (out / "tests.xml").write_text(
                '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/>'
                "</testsuites>"
            )
        if section.name == "roof":
            rows = [{"operation": "gather", "routing": "balanced", "share_of_copy": 0.87, **TIMED}]
            note = {"operation": "combine", "row": "torch", "note": "wrong: not timed"}
            jsonl.write(out / "ops.jsonl", [*rows, note])
        if section.name == "step":  # what bench.step writes before its predictions
            rows = [
                {"row": "graphs", "mode": "train", "N": 48, "p50": 0.0315},
                {"row": "streams", "mode": "train", "note": "not timed: other experts are chosen"},
            ]
            found = {"preset": "homogeneous", "ratio_to_k_single": 1.25, "glue_share_best": 0.02,
                     "glue_share": 0.0125, "sizes": {"224": {"px": 224, "rows": rows}}}  # fmt: skip
            (out / "step-homogeneous.json").write_text(json.dumps(found))
        return statuses.get(section.name, 0)

    return runner


def test_every_section_runs_and_the_table_says_how_it_ended(tmp_path):
    found = gpu_suite.run_all(tmp_path, runner=fake(tmp_path, {"tests": 1, "ops": 124}))
    assert list(found) == ["glue", "tests", "step", "atari", "roof", "ops", "compiled"]
    text = gpu_suite.table(tmp_path, found, {"device": "a GPU", "commit": "abc"})
    assert "device=a GPU commit=abc" in text
    assert "failed with status 1: see tests.log" in text
    assert "out of time" in text
    assert "tests: 9 tests, 1 failures, 0 errors, 2 skipped" in text
    assert "20.0 us   12.50x" in text
    assert "87.0% of copy" in text
    assert "combine torch: wrong: not timed" in text
    assert "step homogeneous 224 px train   graphs                   N=48        31.50 ms" in text
    assert "streams                  not timed: other experts are chosen" in text
    assert text.endswith("step homogeneous: ratio_to_k_single 1.250, glue_share 0.013\n")


def test_without_time_left_sections_are_skipped_and_named(tmp_path):
    found = gpu_suite.run_all(tmp_path, total=0, runner=fake(tmp_path, {}))
    assert {f["status"] for f in found.values()} == {None}
    assert "skipped: no time left" in gpu_suite.table(tmp_path, found, {})


def test_the_budget_fits_nine_minutes(tmp_path):
    assert sum(section.limit for section in gpu_suite.sections(tmp_path)) <= gpu_suite.TOTAL_SECONDS
    assert gpu_suite.TOTAL_SECONDS < 9 * 60


def test_a_section_that_hangs_is_ended_with_its_children(tmp_path):
    hang = "import subprocess, sys, time; print('on', flush=True); " + (
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    section = Section("hang", 1, (sys.executable, "-c", hang))
    assert gpu_suite.run(section, 1.0, tmp_path / "log") == 124
    assert (tmp_path / "log").read_text() == "on\n"
    fails = Section("fails", 1, (sys.executable, "-c", "raise SystemExit(3)"))
    assert gpu_suite.run(fails, 20, tmp_path / "log") == 3


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_sections(tmp_path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path), "--dry-run"]) == 0
    listed = capsys.readouterr().out
    for word in ("bench.ops", "bench.glue", "-m gpu", "tests.xml", "--preset homogeneous", "atari"):
        assert word in listed


def test_the_steps_arguments_are_ones_that_bench_step_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(step.torch.cuda, "is_available", lambda: True)
    commands = [s.command for s in gpu_suite.sections(tmp_path) if "bench.step" in s.command]
    parsed = [step.parse(list(command[3:])) for command in commands]
    assert [args.preset for args in parsed] == ["homogeneous", "atari"]
    assert {args.device for args in parsed} == {"cuda"}
    assert all(args.json.parent == tmp_path for args in parsed)


@pytest.mark.gpu
def test_a_kept_forward_is_differentiated_in_a_graph():
    from bench import operations, timing

    operation = operations.make("combine", operations.Size(48, 5, 2, 100), "cuda")
    graph = timing.capture(lambda: operations.function(operation, "triton", "backward"))
    assert timing.replayed({"backward": graph}, seconds=0, min_rounds=1)["backward"].p50 > 0


@pytest.mark.gpu
def test_graphs_replay_what_was_captured():
    import torch

    from bench import timing

    x, y = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    graph = timing.capture(lambda: lambda: x.add_(y))
    before = x.clone()
    found = timing.replayed({"add": graph}, seconds=0, min_rounds=3)
    assert torch.equal(x, before + 4)  # one replay to warm up, three timed
    assert 0 < found["add"].p50 < 1e-2
