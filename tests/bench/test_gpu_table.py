"""bench.gpu_table: merging runs of several devices, and the tables it writes."""

from __future__ import annotations

import json

import pytest

from bench import gpu_table, jsonl
from bench.gpu_table import BEGIN, END

STAMP = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "threads": 16,
         "python": "3.12.3", "commit": "abc", "driver": "580", "cuda": "13.0"}  # fmt: skip
CPU = {"device": "A CPU @ 3 GHz", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3",
       "commit": "abc", "threads": 2}  # fmt: skip


def row(part, group, name, second=0, ok=True, stamp=STAMP, **values):
    date = f"2026-11-27T10:00:{second:02}.000+00:00"
    return {"part": part, "group": group, "name": name, "ok": ok, **values, **stamp, "date": date}


def times(p50):
    return {"p20": p50 * 0.9, "p50": p50, "p80": p50 * 1.1}


SPEED = [
    row("speed", "ceilings", "copy", text="3.010 TB/s read and written", bytes_per_second=3.01e12),
    row("speed", "step", "single 0", **times(0.018), to_k_single=0.5),
    row("speed", "step", "graphs, 2 lanes", ok=False, note="ValueError: not timed"),
    row("speed", "graphs 1", "single 0", **times(0.019), to_k_single=0.5),
    row("speed", "graphs 1", "graphs, 1 lane", **times(0.040), to_k_single=1.05,
        to_k_captured=1.1, busy=0.039, launches=12.0, peak_memory=3 << 30,
        dearest=[["conv", 0.01, 60.0]]),
    row("speed", "roof", "gather forward graph", **times(2.4e-3), share_of_copy=0.87),
    row("speed", "glue", "48,5,2,100 triton eager", **times(2e-4), speedup=9.5),
    {"part": "speed", "group": "memory", "name": "group", "ok": False, "status": "killed after 9 s",
     "seconds": 9.0, "date": "2026-11-27T10:01:00.000+00:00"},
    *(row("speed", f"cpu {n}", name, stamp=CPU, **times(0.1 / n)) for n in (1, 2, 16)
      for name in ("sequential", "threads")),
]  # fmt: skip
CHECK = [
    row("check", "router", "route 48,5,2", error=3e-7),
    row("check", "router", "route 37,7,3", ok=False, note="mean[3] got 1 expected 2"),
    {"part": "check", "group": "tests", "name": "group", "ok": False, "status": "killed after 50 s",
     "seconds": 50.0, "date": "2026-11-27T10:01:00.000+00:00"},
]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A repository with two documents, and a run."""
    for name in ("README.md", "bench/README.md"):
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    run = tmp_path / "run"
    jsonl.write(run / "speed.jsonl", SPEED)
    jsonl.write(run / "check.jsonl", CHECK)
    return tmp_path / "repository"


def table(root, *arguments):
    return gpu_table.main(list(map(str, arguments)), root, root / "results")


def test_runs_go_to_their_devices_and_into_the_tables(root):
    assert table(root, root.parent / "run") == 0
    results = root / "results"
    gpu = jsonl.read(results / "nvidia-h100-80gb-hbm3" / "gpu.jsonl")
    cpu = jsonl.read(results / "a-cpu-3-ghz" / "gpu.jsonl")
    assert len(gpu) == 11
    assert {r["group"] for r in gpu if r["name"] == "group"} == {"memory", "tests"}
    assert {r["group"] for r in cpu} == {"cpu 1", "cpu 2", "cpu 16"}
    short, whole = ((root / name).read_text() for name in ("README.md", "bench/README.md"))
    assert short.startswith(f"before\n{BEGIN}\n**NVIDIA H100 80GB HBM3**, driver 580, torch 2.11.0")
    assert short.endswith(f"\n{END}\nafter\n")
    assert "| graphs, 1 lane | 40.00 | 1.05 |" in short
    assert "1 of 2 checks are right" in short
    assert "not timed" not in short
    assert "- router: route 37,7,3: mean[3] got 1 expected 2\n- group tests: killed after" in whole
    assert "Ceilings: copy: 3.010 TB/s read and written." in whole
    assert ("| graphs, 1 lane | 40.00 (36.00-44.00) | 1.05 | 1.10 | 39.00 | 12 | 3.0 | "
            "`conv` 10.00 ms |") in whole  # fmt: skip
    assert whole.count("| single 0 |") == 1
    assert "| graphs, 2 lanes | ValueError: not timed |" in whole
    assert "| gather forward graph | 2400.0 | - | 87% |" in whole
    assert "| 16 | 6.25 | 6.25 |" in whole
    assert "**A CPU @ 3 GHz**, torch" in whole
    for text in (short, whole):
        assert gpu_table.NOTHING not in text


def test_the_newest_line_of_a_row_stays_also_where_it_is_a_failure(root):
    table(root, root.parent / "run")
    later = root.parent / "later.jsonl"
    jsonl.write(later, [
        row("check", "router", "route 37,7,3", 30, error=2e-7),
        row("speed", "graphs 1", "graphs, 1 lane", 30, ok=False, note="out of memory"),
        row("speed", "step", "single 0", 30, stamp=STAMP | {"device": "NVIDIA H200"},
            **times(0.017), to_k_single=0.5),
    ])  # fmt: skip
    table(root, later)
    table(root, root.parent / "run")  # older lines change nothing
    gpu = gpu_table.newest(jsonl.read(root / "results" / "nvidia-h100-80gb-hbm3" / "gpu.jsonl"))
    assert gpu["check", "router", "route 37,7,3"]["ok"]
    assert gpu["speed", "graphs 1", "graphs, 1 lane"]["note"] == "out of memory"
    assert gpu["speed", "step", "single 0"]["p50"] == 0.018  # not another device's
    assert (root / "results" / "nvidia-h200" / "gpu.jsonl").exists()
    text = (root / "README.md").read_text()
    assert "2 of 2 checks are right" in text
    assert "**NVIDIA H200**" in text


def test_a_torn_run_is_merged_as_far_as_it_goes(root):
    run = root.parent / "run" / "speed.jsonl"
    whole = run.read_bytes()
    run.write_bytes(whole[: whole.rindex(b'"group": "glue"')])
    table(root, root.parent / "run")
    text = (root / "bench" / "README.md").read_text()
    assert "| gather forward graph |" in text
    assert "48,5,2,100" not in text


def test_without_results_the_tables_say_that_there_are_none(root):
    assert table(root, "--check") == 1
    assert (root / "README.md").read_text() == f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert table(root) == 0
    for name in ("README.md", "bench/README.md"):
        assert (root / name).read_text() == f"before\n{BEGIN}\n{gpu_table.NOTHING}\n{END}\nafter\n"
    assert table(root, "--check") == 0


def test_what_was_skipped_is_not_counted_as_right(root):
    run = root.parent / "skipped.jsonl"
    jsonl.write(run, [
        row("check", "tests", "test_a.py::test_b", skipped="needs more memory"),
        row("check", "tests", "collected", lines_to_come=1, text="1 test"),
    ])  # fmt: skip
    table(root, root.parent / "run", run)
    for name in ("README.md", "bench/README.md"):
        assert "1 of 2 checks are right (1 skipped)." in (root / name).read_text()


def test_one_cycle_is_not_shown_as_a_median(root):
    once = root.parent / "once.jsonl"
    jsonl.write(once, [
        row("speed", "step", "dense", rounds=1, **times(0.05)),
        row("speed", "cpu 4", "threads", stamp=CPU, rounds=1, **times(0.025)),
    ])  # fmt: skip
    table(root, root.parent / "run", once)
    short, whole = ((root / name).read_text() for name in ("README.md", "bench/README.md"))
    assert "| dense | 50.00 (one cycle) | - |" in short
    assert "| dense | 50.00 (one cycle) | - | - |" in whole
    assert "| 4 | - | 25.00 (one cycle) |" in whole


def test_a_bar_in_a_kernels_name_does_not_end_its_cell(root):
    bar = root.parent / "bar.jsonl"
    kernels = [["void f<a | b>", 0.01, 1.0]]
    jsonl.write(bar, [row("speed", "step", "dense", dearest=kernels, **times(0.05))])
    table(root, bar)
    assert "| `void f<a \\| b>` 10.00 ms |" in (root / "bench" / "README.md").read_text()


def test_results_of_a_cpu_alone_are_none_of_a_gpu(root):
    run = root.parent / "cpu.jsonl"
    jsonl.write(run, [r for r in SPEED if r["group"].startswith("cpu")])
    table(root, run)
    assert gpu_table.NOTHING in (root / "README.md").read_text()
    text = (root / "bench" / "README.md").read_text()
    assert gpu_table.NOTHING in text
    assert "| 2 | 50.00 | 50.00 |" in text


def test_what_is_no_run_and_a_document_without_marks_are_refused(root):
    empty = root.parent / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no line names a device"):
        table(root, empty)
    (root / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="expected the marks"):
        table(root)


def test_the_repositorys_tables_are_what_its_results_say():
    assert gpu_table.main(["--check"]) == 0


def test_lines_stay_lines(root):
    table(root, root.parent / "run")
    path = root / "results" / "nvidia-h100-80gb-hbm3" / "gpu.jsonl"
    before = path.read_text()
    table(root)
    table(root, root.parent / "run")
    assert path.read_text() == before
    assert all(isinstance(json.loads(line), dict) for line in before.splitlines())
