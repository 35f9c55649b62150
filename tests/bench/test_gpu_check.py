"""bench.gpu_check without a GPU: the bodies of its groups on a CPU, small, with stand-ins."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.bench import (
    FAILING,
    SMALL_SHELF,
    TINY_GLUE,
    chosen_for_cpu,
    make_hub,
    normed_expert,
    run_here,
    small_cases,
    small_padding,
)

from bench import (
    check_kernels,
    check_models,
    check_padding,
    check_ranks,
    children,
    gpu_check,
    jsonl,
    precompile,
    pytest_lines,
)
from bench.inputs import Size
from bench.records import ROOT


@pytest.fixture
def place(monkeypatch, interpreted):
    chosen_for_cpu(monkeypatch)
    small_padding(monkeypatch)
    for networks in ("NETWORKS", "DRAWING"):
        monkeypatch.setattr(check_padding, networks, {"small": normed_expert})
    monkeypatch.setattr(check_models, "CHANGES", {"as it is": id})
    monkeypatch.setattr(check_ranks, "LAYOUTS", {"ep": "BatchNorm"})
    return gpu_check.Place(
        device="cpu", cases=tuple(small_cases()), glues=(TINY_GLUE,), repeats=1,
        waits_forbidden=contextlib.nullcontext, record=lambda function: function,
        executors=("graphs", "threads"), make_hub=partial(make_hub, budget=10**9), width=16,
        connection="gloo", draws=(Size(9, 5, 2, 1),), shelves={"small": SMALL_SHELF}, **FAILING,
    )  # fmt: skip


def test_every_group_that_needs_no_gpu_runs_on_a_cpu(place, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--seconds", "9999"]  # however busy the machine is
    here = run_here("machine", "compile", "tests", "memory", "export", "inductor")
    assert gpu_check.main(arguments, place, here) == 0, capsys.readouterr().out
    rows = jsonl.read(tmp_path / "check.jsonl")
    # Values of a case each and the group's own line; noise drawn, and by number; 13 + the glue.
    assert Counter(row["group"] for row in rows) == {
        "machine": 1, "compile": 1, "router": 1 + 2 + 1, "gather": 4, "aggregate": 5, "combine": 5,
        "batch norm": 3 + 1, "glue": 14 + 1 + 14 + 1, "executors": 8 + 3 + 1, "captures": 3 + 1,
        "padding": 2 + 1 + 1, "models": 2 + 2 + 1, "shelf": 4 + 1, "resident": 2 + 1,
        "ranks": 2 + 1, "tests": 1, "export": 1, "memory": 1, "inductor": 1,
    }  # fmt: skip
    names = [row["name"] for row in rows]
    assert "route 9,4,2" in names
    assert "graphs BatchNorm bf16" in names
    assert "repeat glue 9,4,2,5" in names
    assert all(row["device"] for row in rows if row["name"] != "group")
    text = capsys.readouterr().out
    assert "router: route 9,4,2 ok " in text
    assert len(text) < 6000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.jsonl"]


def test_a_dry_run_lists_groups_within_the_seconds(capsys):
    assert gpu_check.main(["--dry-run"]) == 0
    listed = capsys.readouterr().out
    for word in (
        "machine",
        "float64: route",
        "float64: batch norm",
        "graphs and streams",
        "padded to sizes: timm ResNet",
        "dropped slots",
        "larger than its room",
        "heads on features: ragged, large",
        "two on one GPU",
        "test_gpu_router",
        "sanitizer",
    ):
        assert word in listed
    planned = [float(line.split("planned")[1].split()[0]) for line in listed.splitlines()]
    assert sum(planned) == pytest.approx(240, abs=len(planned) / 2)  # rounded to seconds


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out.endswith("no GPU: torch.cuda.is_available() is False\n")


def rows_of(writer):
    return jsonl.read(writer.files.rows)


def test_the_machine_is_told_and_kernels_are_compiled_for_it(writer, monkeypatch):
    found = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    gpu_check.machine(gpu_check.Place(), writer, 1.0)
    asked = []
    monkeypatch.setattr(
        precompile, "compile_all", lambda arch, workers: asked.append((arch, workers)) or 1
    )
    gpu_check.compile_kernels(gpu_check.Place(), writer, 1.0)
    assert asked == [(90, precompile.cores())]
    machine, kernels = rows_of(writer)
    assert machine["arch"] == 90
    assert machine["text"].startswith("A GPU, sm_90, 80 GiB, ")
    assert not kernels["ok"]
    assert kernels["text"].endswith("(see the log)")


def test_a_worker_that_fails_to_compile_is_counted(monkeypatch, capfd):
    def broken():
        raise ValueError("no such kernel")

    monkeypatch.setattr(precompile, "launches_compile", lambda arch: contextlib.nullcontext())
    monkeypatch.setattr(
        precompile, "jobs", lambda: [("good", int), ("bad", broken), ("good", int)]
    )  # fmt: skip
    assert precompile.compile_all(90, 3) == 1
    assert "bad: ValueError: no such kernel" in capfd.readouterr().out


COMPILE = """
from bench import precompile
chosen = [job for job in precompile.jobs() if job[0] in (
    "noisy_topk N=48 M=5 K=2 C=100 balanced", "images torch.float32 to torch.bfloat16")]
assert len(chosen) == 2
with precompile.launches_compile(90) as names:
    for _, call in chosen:
        call()
print(" ".join(names))
"""


def test_what_is_compiled_without_a_gpu_is_what_would_be_launched(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    launched = done.stdout.split()
    assert "route_and_plan_kernel" in launched
    assert "_route_backward_kernel" in launched
    compiled = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert compiled == set(launched)


def test_every_kernel_runs_once_for_the_memory_checker(device, interpreted, monkeypatch):
    found = []
    call = check_kernels.operations.found
    monkeypatch.setattr(
        check_kernels.operations, "found",
        lambda operation, row: found.append(operation.name) or call(operation, row),
    )  # fmt: skip
    check_kernels.main(device.type, "triton")
    assert found == [kind for kind, _ in gpu_check.CASES.values()]


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
case "$2" in
memcheck) echo "========= ERROR SUMMARY: 0 errors";;
*) echo "========= Error: Race reported between Write access at 0x10"
   echo "========= RACECHECK SUMMARY: 1 hazard displayed"; exit 9;;
esac
"""


def test_the_memory_checkers_words_are_told(writer, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    gpu_check.memory(gpu_check.Place(), writer, 20.0)
    monkeypatch.setenv("PATH", "")
    gpu_check.memory(gpu_check.Place(), writer, 20.0)
    *said, skipped = (
        (row["name"], row["ok"], row.get("text", row.get("note"))) for row in rows_of(writer)
    )
    assert said == [
        ("memcheck", True, "ERROR SUMMARY: 0 errors"),
        ("racecheck", False, "status 9: RACECHECK SUMMARY: 1 hazard displayed; "
         "first: Error: Race reported between Write access at 0x10"),
    ]  # fmt: skip
    assert skipped == ("compute-sanitizer", True, None)
    assert rows_of(writer)[-1]["skipped"] == "not installed: nothing was checked"


@pytest.fixture
def asked(monkeypatch):
    """The commands that this process would have become."""
    found = []
    monkeypatch.setattr(gpu_check.os, "execv", lambda path, command: found.append(command))
    monkeypatch.setattr(gpu_check.os, "chdir", lambda path: None)
    for name in (pytest_lines.VARIABLE, "PYTHONPATH", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # so that they are put back
    return found


def test_the_tests_of_a_gpu_are_named_by_file_those_of_most_worth_first(writer, asked):
    gpu_check.tests(gpu_check.Place(), writer, 1.0)
    files = [word for word in asked[0] if word.endswith(".py")]
    names = [os.path.basename(name) for name in files]
    assert set(names[: len(gpu_check.FIRST)]) == {f"{name}.py" for name in gpu_check.FIRST}
    assert {"test_gpu_outputs.py", "test_gpu_router.py"} <= set(names)
    # These run on a CPU, too: all the more on a GPU.
    assert {"test_feature_heads.py", "test_shelf_bank.py", "test_shelf_bank_fit.py"} <= set(names)
    assert asked[0][asked[0].index("pytest") + 1 :].count("gpu or either") == 1
    assert all(os.path.isabs(name) and os.path.exists(name) for name in files)
    assert pytest_lines.writer().stamp == {"device": "d"}
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"


@pytest.mark.parametrize(("cores", "workers"), [(4, ["4", "4"]), (16, ["14", "6"])])
def test_what_inductor_compiles_for_is_tested_last_and_by_itself(
    writer, asked, monkeypatch, cores, workers
):
    monkeypatch.setattr(precompile, "cores", lambda: cores)
    gpu_check.tests(gpu_check.Place(), writer, 1.0)
    gpu_check.inductor(gpu_check.Place(), writer, 1.0)
    left_out, alone = asked
    assert {f"--deselect={name}" for name in gpu_check.INDUCTOR} <= set(left_out)
    assert alone[-2:] == list(gpu_check.INDUCTOR)
    assert [command[command.index("-n") + 1] for command in asked] == workers
    last = gpu_check.groups(gpu_check.Place())[-1]
    assert (last.name, last.seconds) == ("inductor", 38)  # cold, 16 s were too few for any of them
    for test in gpu_check.INDUCTOR:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text()


TESTS = """
import os, pytest
def test_passes(): pass
def test_fails(): assert 1 + 1 == 3
@pytest.mark.skip(reason="needs more memory")
def test_is_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("no context")
def test_has_no_fixture(broken): pass
def test_kills_its_process(): os._exit(9)
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_each_test_is_a_line_even_where_pytest_dies(writer, tmp_path, monkeypatch, workers):
    for name in (pytest_lines.VARIABLE, "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    pytest_lines.prepare(writer)
    file, bad = tmp_path / "test_some.py", tmp_path / "test_bad.py"
    file.write_text(TESTS)
    bad.write_text("import a_module_that_is_not_there")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "bench.pytest_lines", "-p",
         "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={tmp_path}", str(bad),
         str(file)],
        capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    rows = {row["name"].removeprefix("test_some.py::"): row for row in rows_of(writer)}
    assert rows["test_passes"]["ok"]
    assert rows["test_fails"]["note"] == "assert (1 + 1) == 3"
    assert rows["test_is_skipped"]["skipped"] == "needs more memory"
    assert rows["collected"]["lines_to_come"] == 5
    assert rows["test_has_no_fixture"]["note"] == "RuntimeError: no context"
    assert "a_module_that_is_not_there" in rows["collect test_bad.py"]["note"]
    assert {row["device"] for row in rows.values()} == {"d"}
    if workers == "0":  # where a worker dies, xdist tells of its test, and takes another
        assert children.missing(rows_of(writer)) == ["1 of 5 results are missing"]


def test_only_some_groups_are_run(capsys):
    assert gpu_check.main(["--only", "glue,router", "--dry-run"]) == 0
    planned = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert planned == ["machine", "compile", "router", "glue"]
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "glue,rooter", "--dry-run"])
    assert "--only: expected some of router, gather," in capsys.readouterr().err
