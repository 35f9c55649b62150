"""bench.gpu_table: merging runs of several devices, and the tables it writes."""

from __future__ import annotations

import pytest

from bench import gpu_goals, gpu_rows, gpu_table, jsonl
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
    row("speed", "graphs", "single 0", **times(0.019), to_k_single=0.5),
    row("speed", "graphs", "graphs, 1 lane", **times(0.040), to_k_single=1.05,
        to_k_captured=1.1, busy=0.039, launches=12.0, peak_memory=3 << 30,
        dearest=[["conv", 0.01, 60.0]]),
    row("speed", "roof", "gather 9,3,2,5 float32 forward graph", **times(2.4e-3),
        share_of_copy=0.3, fewest_bytes=6.3e9),
    row("speed", "glue", "1024,64,2,1000 reference eager", **times(5e-2), speedup=1.0),
    row("speed", "glue", "48,5,2,100 reference eager", **times(1.9e-3), speedup=1.0),
    row("speed", "glue", "48,5,2,100 triton eager", **times(2e-4), speedup=9.5, busy=4e-5),
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
    for name in ("docs/results.md", "bench/README.md"):
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    run = tmp_path / "run"
    jsonl.write(run / "speed.jsonl", SPEED)
    jsonl.write(run / "check.jsonl", CHECK)
    return tmp_path / "repository"


def table(root, *arguments):
    return gpu_table.main(list(map(str, arguments)), root, root / "results")


def documents(root, rows=(), *runs):
    """Both documents, after these runs and a run of these rows."""
    if rows:
        jsonl.write(root.parent / "more.jsonl", rows)
        table(root, *runs, root.parent / "more.jsonl")
    return [(root / name).read_text() for name in ("docs/results.md", "bench/README.md")]


def test_runs_go_to_their_devices_and_into_the_tables(root):
    assert table(root, root.parent / "run") == 0
    results = root / "results"
    gpu = jsonl.read(results / "nvidia-h100-80gb-hbm3" / "gpu.jsonl")
    cpu = jsonl.read(results / "a-cpu-3-ghz" / "gpu.jsonl")
    assert len(gpu) == 13
    assert {r["group"] for r in gpu if r["name"] == "group"} == {"memory", "tests"}
    assert {r["group"] for r in cpu} == {"cpu 1", "cpu 2", "cpu 16"}
    short, whole = documents(root)
    assert short.startswith(f"before\n{BEGIN}\n**NVIDIA H100 80GB HBM3**, driver 580, torch 2.11.0")
    assert short.endswith(f"\n{END}\nafter\n")
    assert "| experts as captured graphs, 1 lane | 40.00 | 39.00 | 1.05 |" in short
    assert ("3 of 18 goals are met, 14 not measured. Missed: the paper's step, time over K eager "
            "singles 1.05 (graphs, 1 lane) (at most 0.90).") in short  # fmt: skip
    assert "1 of 2 checks are right" in short
    assert "not timed" not in short
    assert "- router: route 37,7,3: mean[3] got 1 expected 2\n- group tests: killed after" in whole
    assert "Ceilings: copy: 3.010 TB/s read and written." in whole
    assert ("| graphs, 1 lane | 40.00 (36.00-44.00) | 39.00 | 1.05 | 1.10 | 12 | 3.0 | "
            "`conv` 10.00 ms |") in whole  # fmt: skip
    assert whole.count("| single 0 |") == 1
    assert "| graphs, 2 lanes | ValueError: not timed |" in whole
    # The share is of the newest copy, 3.01e12 bytes a second.
    assert "| gather 9,3,2,5 float32 | 2400, 87% | - | - | - |" in whole
    assert ("| 48,5,2,100 | 40 | 1900 | 200 (9.5x) |\n| 1024,64,2,1000 | - | 50000 | - |") in whole
    assert "| 16 | 6.25 | 6.25 |" in whole
    assert "**A CPU @ 3 GHz**, torch" in whole
    for text in (short, whole):
        assert gpu_table.NOTHING not in text


def test_the_newest_line_of_a_row_stays_also_where_it_is_a_failure(root):
    table(root, root.parent / "run")
    later = root.parent / "later.jsonl"
    jsonl.write(later, [
        row("check", "router", "route 37,7,3", 30, error=2e-7),
        row("speed", "graphs", "graphs, 1 lane", 30, ok=False, note="out of memory"),
        row("speed", "step", "single 0", 30, stamp=STAMP | {"device": "NVIDIA H200"},
            **times(0.017), to_k_single=0.5),
    ])  # fmt: skip
    table(root, later)
    path = root / "results" / "nvidia-h100-80gb-hbm3" / "gpu.jsonl"
    before = path.read_text()
    table(root, root.parent / "run")  # older lines change nothing
    assert path.read_text() == before
    gpu = gpu_rows.newest(jsonl.read(path))
    assert gpu["check", "router", "route 37,7,3"]["ok"]
    assert gpu["speed", "graphs", "graphs, 1 lane"]["note"] == "out of memory"
    assert gpu["speed", "step", "single 0"]["p50"] == 0.018  # not another device's
    assert (root / "results" / "nvidia-h200" / "gpu.jsonl").exists()
    text = (root / "docs/results.md").read_text()
    assert "2 of 2 checks are right" in text
    assert "**NVIDIA H200**" in text


@pytest.mark.parametrize("ended_well", [True, False])
def test_a_failure_stays_until_its_group_ends_well_without_it(ended_well):
    end = {"ok": ended_well, "status": "ok" if ended_well else "killed after 5 s", "seconds": 5.0}
    rows = [
        row("check", "gather", "error", 10, ok=False, note="no such file"),
        row("check", "gather", "one", 10),
        row("check", "router", "error", 10, ok=False, note="another group's"),
        row("check", "gather", "three", 17, ok=False, note="of the later run, which began at 16"),
        row("check", "gather", "group", 21, **end),
    ]
    found = gpu_rows.newest(rows)
    names = [name for _, group, name in found if group == "gather" and name != "group"]
    assert names == [*["error"] * (not ended_well), "one", "three"]
    assert ("check", "router", "error") in found


def test_without_results_the_tables_say_that_there_are_none(root):
    assert table(root, "--check") == 1
    assert (root / "docs/results.md").read_text() == f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert table(root) == 0
    assert documents(root) == [f"before\n{BEGIN}\n{gpu_table.NOTHING}\n{END}\nafter\n"] * 2
    assert table(root, "--check") == 0


def test_what_was_skipped_is_not_counted_as_right(root):
    rows = [
        row("check", "tests", "test_a.py::test_b", skipped="needs more memory"),
        row("check", "tests", "collected", lines_to_come=1, text="1 test"),
    ]
    for text in documents(root, rows, root.parent / "run"):
        assert "1 of 2 checks are right (1 skipped)." in text


def test_one_cycle_is_not_shown_as_a_median(root):
    once = [
        row("speed", "step", "dense", rounds=1, **times(0.05)),
        row("speed", "cpu 4", "threads", stamp=CPU, rounds=1, **times(0.025)),
    ]
    short, whole = documents(root, once, root.parent / "run")
    assert "| every expert on every image | 50.00 (one cycle) | - | - |" in short
    assert "| dense | 50.00 (one cycle) | - | - | - |" in whole
    assert "| 4 | - | 25.00 (one cycle) |" in whole


AGGREGATE = "aggregate 4096,64,2,1000 bfloat16"
ALL = [
    row("speed", "ceilings", "copy", text="4 TB/s", bytes_per_second=4e12),
    row("speed", "ceilings", "copy 1:2", text="3.6 TB/s", bytes_per_second=3.6e12),
    row("speed", "glue", "48,5,2,100 reference eager", **times(6e-3)),
    row("speed", "glue", "48,5,2,100 triton eager", **times(2e-3), speedup=3.0),
    row("speed", "compiled", "48,5,2,100 compiled eager", **times(4e-3), speedup=1.5),
    row("speed", "compiled", "48,5,2,100 triton eager", **times(2e-3), speedup=3.0),
    row("speed", "roof", "noisy_topk 262144,64,2,10 float32 forward graph", **times(1e-4),
        fewest_bytes=2e8),
    row("speed", "roof", "noisy_topk 262144,64,2,10 float32 backward graph", **times(1e-4),
        fewest_bytes=4.4e8),
    row("speed", "roof", "gather 524288,5,2,1000 float32 forward graph", **times(1e-3),
        fewest_bytes=4.4e9),
    row("speed", "roof", "gather 524288,5,2,1000 float32 forward eager", **times(1.1e-3),
        fewest_bytes=4.4e9),
    *(row("speed", "roof", f"masked_batch_norm 20/24,256,56x56,{name} bfloat16{whose} {way} graph",
          **times(1e-4), fewest_bytes=share * 4e8)
      for name, whose, way, share in (
          ("identity", "", "forward", 0.9), ("identity", "", "backward", 0.85),
          ("residual+relu", "", "forward", 0.8), ("residual+relu", "", "backward", 0.75),
          ("residual+relu", " reference", "backward", 0.3),
      )),
    row("speed", "stream", "balanced", **times(0.03), p95=0.0315, slowest=0.04, rounds=240,
        hits=1200, misses=0, captures_ahead=25, captures=0, padding=0.071),
    row("speed", "stream", "drifting", **times(0.03), p95=0.036, slowest=0.6, rounds=240,
        hits=1190, misses=2, captures_ahead=25, captures=3, padding=0.094),
    row("speed", "aggregate", f"{AGGREGATE} triton graph", **times(3e-4)),
    row("speed", "aggregate", f"{AGGREGATE} dense graph", **times(3e-3)),
    row("speed", "aggregate", f"{AGGREGATE} triton eager", **times(4e-4), peak_memory=1 << 27),
    row("speed", "aggregate", f"{AGGREGATE} dense eager", **times(3e-3), peak_memory=1 << 30),
    row("speed", "aggregate", f"{AGGREGATE} reference", ok=False, note="out of memory"),
    row("speed", "step", "dense", **times(0.1), peak_memory=10 << 30),
    row("speed", "step", "reference", **times(0.06), peak_memory=4 << 30),
    row("speed", "step", "captured single 0", **times(0.02), peak_memory=5),
    row("speed", "graphs", "graphs, 8 lanes", **times(0.04), to_k_single=0.8, to_k_captured=1.2,
        peak_memory=5 << 30),
    row("speed", "graphs", "graphs, 1 lane", **times(0.05), to_k_single=1.0, to_k_captured=1.3,
        peak_memory=5 << 30),
    row("speed", "large", "sequential", **times(0.2)),
    row("speed", "large", "graphs, 8 lanes", **times(0.25)),
    row("speed", "agent", "scratch eager", **times(0.01), steps_per_second=100.0, busy=0.001,
        launches=300),
    row("speed", "agent", "scratch captured", **times(0.002), steps_per_second=500.0),
    row("speed", "agent", "hub eager", **times(0.03), steps_per_second=33.3),
    row("speed", "agent", "hub captured", **times(0.004), steps_per_second=250.0),
    row("speed", "atari", "sequential", **times(0.01)),
    row("speed", "atari", "graphs", **times(0.004)),
    row("speed", "growth", "sequential, M=64", M=64, step=times(0.2), **{"experts alone":
        times(0.1)}),
    row("speed", "growth", "sequential, growth", growth_beyond_smaller_groups=1.1, text="x1.10"),
    row("speed", "growth", "graphs, growth", growth_beyond_smaller_groups=1.4, text="x1.40"),
    row("speed", "resident", "room for 4, 90% hits", **times(0.005), text="5.00 ms, 0.87 of it"),
    row("speed", "shelf", "sequential", **times(0.02), text="20.00 ms, 900 launches"),
    row("speed", "predict", "single 0, N=64", N=64, **times(0.005), to_single=1.0),
    row("speed", "predict", "graphs, N=1", N=1, **times(0.008), to_single=1.6),
]  # fmt: skip


def goal(words):
    return next(goal for goal in gpu_goals.GOALS if words in goal.figure)


def test_every_prediction_is_of_a_goal_and_every_open_goal_has_one():
    figures = [goal.figure for goal in gpu_goals.GOALS]
    found = gpu_goals.predictions()["goals"]
    assert set(found) <= set(figures)
    for figure, prediction in found.items():
        assert prediction["low"] <= prediction["high"], figure
        assert prediction["by"], figure
    devices = filter(gpu_rows.on_gpu, gpu_rows.devices_in(gpu_table.RESULTS))
    lines = [line for rows in devices for line in gpu_goals.lines(rows)]
    missed = {line[0] for line in lines if line[3] == gpu_goals.MISSED}
    unmeasured = {line[0] for line in lines if line[3] == gpu_goals.NOT_MEASURED}
    assert missed | unmeasured <= set(found)
    assert all(goal.why for goal in gpu_goals.GOALS if goal.figure in missed)


def test_a_prediction_is_a_range_in_the_form_of_its_goal(monkeypatch):
    known = {"commit": "abc", "date": "2026-11-28", "goals": {
        "a": {"low": 0.5, "high": 0.625, "by": "counts"}, "b": {"low": 1, "high": 1, "by": "x"},
    }}  # fmt: skip
    monkeypatch.setattr(gpu_goals, "predictions", lambda: known)
    told = [gpu_goals.Goal(name, None, 1.0, text="{:.0%}").predicted for name in "abc"]
    assert told == ["50% to 62%", "100%", "-"]
    assert gpu_goals.foretold() == [
        "Predicted on 2026-11-28 for commit abc, which had run on no device:", "- a: counts",
        "- b: x",
    ]  # fmt: skip


def test_a_gather_is_compared_with_a_copy_of_its_mix_in_the_same_rounds():
    ours, other = (row("speed", "roof", f"gather 9,3,2,5 float32 {name}forward graph",
                       fewest_bytes=4e9, p20=t, p50=t, p80=t)
                   for name, t in (("", 2e-3), ("repeat ", 1.9e-3)))  # fmt: skip
    found = gpu_goals.roof("gather ")(gpu_rows.newest([ours, other, *ALL[:2]]))
    assert found == gpu_goals.Found(0.5, "forward, 95% of a copy of its mix")


def test_graphs_that_do_not_fit_are_not_slower_than_what_runs_then():
    graphs = row("speed", "large", "graphs, 8 lanes", ok=False,
                 note="ValueError: not timed: the experts' graphs would need some 30.4 GiB, and "
                 "may take 24.0 GiB")  # fmt: skip
    rows = gpu_rows.newest([row("speed", "large", "sequential", **times(0.2)), graphs])
    found = gpu_goals.larger_batches(rows)
    assert found == gpu_goals.Found(1.0, "they do not fit: auto runs sequential")
    other = gpu_rows.newest([graphs | {"note": "out of memory"}])
    assert gpu_goals.larger_batches(other) is None


def test_goals_are_met_missed_or_not_measured():
    rows = gpu_rows.newest(ALL)
    assert [line[2:] for line in gpu_goals.lines(rows)] == [
        ["3.00x", "**missed**"], ["2.00x", "met"],
        ["50% (forward, 56% in the fastest fifth)", "**missed**"],
        ["110% (forward, above the copy, 122% of a copy of its mix, 122% in the fastest fifth)",
         "met"], ["-", "not measured"], ["-", "not measured"],
        ["75% (backward of 20/24,256,56x56,residual+relu, 83% in the fastest fifth)",
         "**missed**"],
        ["10.00x", "met"], ["0.125", "**missed**"], ["0.80 (graphs, 8 lanes)", "met"],
        ["1.20 (graphs, 8 lanes)", "**missed**"], ["2.50x (graphs, 8 lanes)", "met"],
        ["1.50x (graphs, 8 lanes)", "**missed**"], ["0.50 (graphs, 8 lanes)", "met"],
        ["1.20 (drifting)", "**missed**"],
        ["0.80x", "**missed**"], ["5.00x (scratch)", "met"], ["1.40 (graphs)", "**missed**"],
    ]  # fmt: skip
    old = {key: row for key, row in rows.items() if key[1] != "agent"}
    without = rows | {("speed", "agent", "hub captured"): {"ok": False}}
    for other in (old, without):  # the hub's executors say nothing about an agent
        assert gpu_goals.captured_agent(other) is None
    short = rows | {("speed", "stream", "drifting"): rows["speed", "stream", "drifting"]
                    | {"rounds": 199}}  # fmt: skip
    assert gpu_goals.stalls(short) == gpu_goals.Found(pytest.approx(1.05), "balanced")
    assert gpu_goals.lanes(rows) == "Fastest: graphs, 8 lanes; 1 lane 1.25x as long."
    rows = {key: row | {"ok": False} for key, row in rows.items()}
    assert {line[3] for line in gpu_goals.lines(rows)} == {"not measured"}


def test_every_table_has_its_rows(root):
    _, text = documents(root, ALL)
    for line in (
        "| router (262144, 64, 2), share of a copy | at least 60% | {} | 50% (forward, 56% in the "
        "fastest fifth) | **missed** |".format(goal("router").predicted),
        "- " + goal("router").figure + ": " + goal("router").why + "\n",
        "| graphs, 8 lanes | 40.00 (36.00-44.00) | - | 0.80 | 1.20 | - | 5.0 (0.50) | - |",
        "| captured single 0 | 20.00 (18.00-22.00) | - | - | - | - | - | - |",
        "| gather 524288,5,2,1000 float32 | 1000, 110%\\* | - | 1100, 100% | - |\n",
        f"| {AGGREGATE} dense | 3.00 | 3.00 | 1024 | 1.00 |",
        f"| {AGGREGATE} triton | 0.30 | 0.40 | 128 | 0.12 |",
        f"- {AGGREGATE} reference: out of memory",
        "| 48,5,2,100 | - | 4000 (1.5x) | 2000 (3.0x) |",
        "| sequential, M=64 | 200.00 | 100.00 |",
        "graphs, growth: x1.40.",
        "| drifting, 240 steps | 30.00 | 36.00 | 1.20 | 600.00 | 1190 | 2 | 25 + 3 | 9.4% |",
        "20/24,256,56x56,residual+relu bfloat16 | 100, 80% | 100, 75% | - | - |",
        "20/24,256,56x56,residual+relu bfloat16 reference | - | 100, 30% | - |",
        "| room for 4, 90% hits | 5.00 ms, 0.87 of it |",
        "| sequential | 20.00 ms, 900 launches |",
        "| scratch eager | 10.00 (9.00-11.00) | 100 | 1.00 | 300 |",
        "| hub captured | 4.00 (3.60-4.40) | 250 | - | - |",
        "| graphs, N=1 | 8.00 (7.20-8.80) | 1.60 |\n| single 0, N=64 | 5.00 (4.50-5.50) | 1.00 |",
    ):
        assert line in text, line
    assert text.count(gpu_table.REMARK) == 1


def test_a_bar_in_a_kernels_name_does_not_end_its_cell(root):
    kernels = [["void a::f|g<a | b>(c)", 0.01, 1.0]]
    bar = row("speed", "step", "dense", dearest=kernels, **times(0.05))
    assert "| `f\\|g` 10.00 ms |" in documents(root, [bar])[1]


def test_results_of_a_cpu_alone_are_none_of_a_gpu(root):
    short, text = documents(root, [r for r in SPEED if r["group"].startswith("cpu")])
    assert gpu_table.NOTHING in short
    assert gpu_table.NOTHING in text
    assert "| 2 | 50.00 | 50.00 |" in text


def test_what_is_no_run_and_a_document_without_marks_are_refused(root):
    empty = root.parent / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no line names a device"):
        table(root, empty)
    (root / "docs/results.md").write_text("no marks")
    with pytest.raises(ValueError, match="expected the marks"):
        table(root)


def test_the_repositorys_tables_are_what_its_results_say():
    assert gpu_table.main(["--check"]) == 0


def test_a_slow_host_is_named_where_eager_rows_wait_for_it():
    slow, fast = (
        row("speed", "step", "sequential", **times(p50), busy=0.030, launches=4000)
        for p50 in (0.100, 0.040)
    )
    (said,) = gpu_table.host([gpu_rows.newest([slow])])
    assert said.startswith("This machine's host takes 25 us for each launch of an eager step")
    assert gpu_table.host([gpu_rows.newest([fast])]) == []


def test_two_cards_share_the_tables_of_what_was_aimed_at_and_of_the_papers_step(root):
    other = STAMP | {"device": "NVIDIA H200"}
    slow = {"busy": 0.030, "launches": 4000}
    rows = [
        row("speed", "step", "sequential", **times(0.1), **slow),
        row("speed", "graphs", "graphs, 2 lanes", 50, stamp=other, **times(0.03), to_k_single=0.5,
            busy=0.029),
        row("speed", "step", "sequential", 50, stamp=other, **times(0.08), **slow),
        row("speed", "step", "single 0", 50, stamp=other, **times(0.02)),
        row("speed", "cpu 4", "threads", 55, stamp=CPU, **times(0.1)),
    ]  # fmt: skip
    short, whole = documents(root, rows, root.parent / "run")
    # The card that was measured last is the first; what has no driver is no card.
    assert "K = 2 | H200: ms | device busy, ms | x K single models | H100: ms |" in short
    assert "| experts as captured graphs, 2 lanes | 30.00 | 29.00 | 0.50 | - | - | - |" in short
    assert "| experts as captured graphs, 1 lane | - | - | - | 40.00 | 39.00 | 1.05 |" in short
    assert "Hosts take 20 us (H200), 25 us (H100) for each launch of an eager step, and" in short
    assert "H200: 1 of 18 goals are met, 17 not measured." in short
    assert "H100: 3 of 18 goals are met, 14 not measured. Missed: the paper's step" in short
    assert "| goal | wanted | predicted | H200 | result | H100 | result |" in whole
    assert (
        "| the paper's step, time over K eager singles | at most 0.90 | {} | 0.50 (graphs, 2 "
        "lanes) | met | 1.05 (graphs, 1 lane) | **missed** |"
    ).format(goal("K eager singles").predicted) in whole
    assert whole.count("| goal |") == 1
    order = [whole.index(f"**{name}**") for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3")]
    assert order == sorted(order)
    assert order[1] < whole.index("**A CPU @ 3 GHz**")
