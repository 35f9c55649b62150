"""Groups in processes of their own: limits, deaths, and what is on disk after them."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.waiting import has_text, wait_until

from bench import children, jsonl
from bench.children import Files, Group
from bench.records import ROOT


def stamp():
    return {"device": "a device"}


def writes(write, seconds):
    write("one", error=3e-7)
    write("two", ok=False, note="x[0] got 1 expected 2")
    print("printed")


def hangs(write, seconds):
    write("before")
    subprocess.run(
        [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    )


def dies(write, seconds):
    write("before")
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(write, seconds):
    raise ValueError("a wrong argument\nand more")


def run(tmp_path, groups, seconds=30.0, **options):
    files = Files(tmp_path, "check")
    ended = children.run_groups(groups, seconds, files, stamp, **options)
    return ended, jsonl.read(files.rows), files


def test_a_group_that_dies_costs_itself_only(tmp_path, capfd):
    groups = [Group(body.__name__, 5, body) for body in (dies, raises, writes)]
    ended, rows, files = run(tmp_path, groups)
    assert ended == {
        "dies": "killed by SIGSEGV", "raises": "failed with status 1", "writes": "ok",
    }  # fmt: skip
    assert [(row["group"], row["name"], row["ok"]) for row in rows] == [
        ("dies", "before", True), ("dies", "group", False),
        ("raises", "error", False), ("raises", "group", False),
        ("writes", "one", True), ("writes", "two", False), ("writes", "group", True),
    ]  # fmt: skip
    assert rows[2]["note"] == "ValueError: a wrong argument"
    assert rows[4]["device"] == "a device"
    log = files.log.read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert "and more" in log  # the whole traceback
    assert "printed" in log
    assert "printed" not in capfd.readouterr().out
    text = children.table(rows, ended, 10_000)
    assert text.splitlines()[:4] == [
        "2 failed, 2 ok, 0 skipped", "raises: error FAILED ValueError: a wrong argument",
        "writes: two FAILED x[0] got 1 expected 2", "dies: killed by SIGSEGV",
    ]  # fmt: skip
    assert text.endswith("dies: before ok\nwrites: one ok 3e-7")


def cut_off(write, seconds):
    write("before")
    write("collected", lines_to_come=3, text="3 tests", quiet=True)
    write("one")
    write("two", skipped="needs more memory", quiet=True)


def whole(write, seconds):
    cut_off(write, seconds)
    write("two", ok=False, note="its teardown, too")
    write("three")


def test_results_that_were_announced_and_did_not_come_are_missed(tmp_path):
    groups = [Group("cut_off", 5, cut_off), Group("whole", 5, whole)]
    ended, rows, _ = run(tmp_path, groups)
    assert ended == {"cut_off": "1 of 3 results are missing", "whole": "ok"}
    assert [row["ok"] for row in rows if row["name"] == "group"] == [False, True]
    killed = Group(
        "cut_off", 5, lambda write, _: [cut_off(write, 0), os.kill(os.getpid(), signal.SIGKILL)]
    )
    status = run(tmp_path, [killed])[0]["cut_off"]
    assert status == "killed by SIGKILL, 1 of 3 results are missing"


def test_what_was_skipped_is_neither_right_nor_wrong():
    rows = [
        {"group": "tests", "name": "one", "ok": True, "text": "0.1 s", "quiet": True},
        {"group": "tests", "name": "two", "ok": True, "skipped": "no GPU", "quiet": True},
        {"group": "memory", "name": "racecheck", "ok": True, "skipped": "not installed"},
    ]
    assert children.table(rows, {}, 1000).splitlines() == [
        "0 failed, 1 ok, 2 skipped", "", "memory: racecheck skipped: not installed",
    ]  # fmt: skip


def writes_again(write, seconds):
    write("one", text="5 ms", quiet=True)  # of one cycle
    write("two", text="7 ms")
    write("one", text="4 ms")
    write("two", ok=False, note="its teardown, too")
    write("one", text="4 ms, 900 launches")


def test_a_result_that_is_written_again_is_one_and_its_last_counts(tmp_path, capfd):
    options = argparse.Namespace(dry_run=False, cache=None, out=tmp_path, seconds=30.0)
    groups = [Group("again", 5, writes_again)]
    assert children.command(options, "speed", groups, stamp, time.monotonic()) == 1
    assert capfd.readouterr().out.splitlines()[1:] == [
        "1 failed, 1 ok, 0 skipped", "again: two FAILED its teardown, too", "",
        "again: one ok 4 ms, 900 launches",
    ]  # fmt: skip
    assert len(jsonl.read(tmp_path / "speed.jsonl")) == 6  # each as it came, and how it ended


def test_a_group_that_hangs_is_killed_with_its_children(tmp_path):
    def clock():
        """Its second is over when its child has begun, however long that takes."""
        return 2.0 * (files.log.exists() and files.log.read_text().strip()[-1:].isdigit())

    files = Files(tmp_path, "check")
    ended = children.run_child(Group("hangs", 1, hangs), 1.0, files, stamp, clock)
    assert ended == "killed after 1 s"
    assert [row["name"] for row in jsonl.read(files.rows)] == ["before"]
    grandchild = int(files.log.read_text().splitlines()[-1])
    wait_until(lambda: gone(grandchild), "the end of the grandchild")


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_limits_keep_half_of_what_later_groups_are_planned_for():
    groups = [Group("a", 10, writes), Group("b", 20, writes), Group("c", 30, writes)]
    assert children.limit_of(groups, 0, left=60, scale=1) == 20  # twice its own
    assert children.limit_of(groups, 1, left=40, scale=1) == 25  # 15 are kept for c
    assert children.limit_of(groups, 2, left=5, scale=1) == 5
    # However long each takes, all together keep to the seconds.
    left = 60.0
    for index in range(3):
        left -= children.limit_of(groups, index, left, 1)
    assert left == pytest.approx(0)


def test_a_group_that_is_needed_may_take_all_that_is_left():
    """A cold start that takes longer than planned must not end everything; nor must few seconds."""
    groups = [Group("machine", 6, writes, needed=True), Group("b", 200, writes)]
    assert children.limit_of(groups, 0, left=90, scale=1) == 90
    assert children.limit_of(groups, 0, left=3, scale=children.scale_of(groups, 3)) == 3
    assert children.limit_of(groups, 1, left=50, scale=1) == 50
    assert children.plan(groups, 3).startswith("machine          planned    0 s, at most    3 s")


def test_no_group_is_begun_without_time_and_none_after_one_that_is_needed(tmp_path):
    def slow(group, limit, files, stamp):
        now[0] += limit
        return "killed"

    now = [0.0]
    groups = [Group("a", 5, writes), Group("b", 5, writes)]
    ended, rows, _ = run(tmp_path / "slow", groups, 3.0, runner=slow, clock=lambda: now[0])
    assert ended == {"a": "killed", "b": "skipped: no time left"}
    assert now[0] <= 3.0
    assert rows[1]["status"] == "skipped: no time left"
    groups = [Group("a", 5, raises, needed=True), Group("b", 5, writes)]
    assert run(tmp_path / "needed", groups)[0] == {"a": "failed with status 1"}


def test_the_table_keeps_to_its_characters():
    rows = [
        {"group": "g", "name": f"check {i}", "ok": i != 150, "error": 1e-7, "note": "x" * 400}
        for i in range(200)
    ]
    text = children.table(rows, {"g": "ok"}, 2000)
    assert 1500 < len(text) <= 2000
    assert text.splitlines()[1].startswith("g: check 150 FAILED xxx")
    assert text.splitlines()[-1].endswith("more lines in the file")


SCRIPT = """
import sys, pathlib
from bench import children
def fast(write, seconds):
    for i in range(100_000):
        write(f"row {i}", value="x" * (i % 97))
groups = [children.Group("fast", 30, fast)]
files = children.Files(pathlib.Path(sys.argv[1]), "check")
print("begun", flush=True)
children.run_groups(groups, 60, files, dict)
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_second_what_is_on_disk_is_read_back_whole(tmp_path, seed):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, stdout=subprocess.PIPE,
        start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    process.stdout.readline()
    time.sleep(0.05 + random.Random(seed).random())
    group = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (*group, process.pid):
        os.kill(int(pid), signal.SIGKILL)
    process.wait()
    rows = jsonl.read(Files(tmp_path, "check").rows)
    assert [row["name"] for row in rows] == [f"row {i}" for i in range(len(rows))]
    assert all(row["value"] == "x" * (i % 97) for i, row in enumerate(rows))


ORPHANS = """
import os, sys, pathlib, time
from bench import children
def waits(write, seconds):
    print(os.getpid(), flush=True)
    time.sleep(60)
def becomes_another(write, seconds):
    os.execv(sys.executable, [sys.executable, "-c",
        "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
groups = [children.Group("orphan", 30, locals()[sys.argv[2]])]
children.run_groups(groups, 60, children.Files(pathlib.Path(sys.argv[1]), "check"), dict)
"""


@pytest.mark.parametrize("body", ["waits", "becomes_another"])
def test_a_group_is_killed_with_the_command_that_began_it(tmp_path, body):
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(tmp_path), body],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    log = tmp_path / "check.log"

    def last_line():
        return log.read_text().splitlines()[-1] if has_text(log) else ""

    wait_until(lambda: last_line().isdigit(), "the group")
    group = last_line()
    try:
        assert not gone(int(group))
        process.kill()
        process.wait()
        wait_until(lambda: gone(int(group)), "the end of the group")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(group), signal.SIGKILL)


def test_a_command_began_with_its_process():
    now = time.monotonic()
    assert now - 3600 * 24 < children.begun(None) < now
    assert children.begun([]) >= now
