"""One process at a time in a folder, whatever became of the one before."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from hubpath_fast import locks
from hubpath_fast.files import write_bytes
from hubpath_fast.locks import LOCK, MADE, locked

HOLD = """
import os, sys, time
from hubpath_fast.locks import locked
with locked(sys.argv[1]):
    if len(sys.argv) > 2 and os.fork() == 0:  # as DataLoader starts its workers
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder, *more):
    """A process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True,
        start_new_session=hasattr(os, "setsid"),
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_has_it_and_the_third_gets_it(tmp_path):
    run = tmp_path / "run"
    with locked(run):
        note = json.loads((run / LOCK).read_text())
        assert (note["pid"], note["host"]) == (os.getpid(), platform.node())
        refusal = pytest.raises(ValueError, match="another comparison is at work")
        with refusal as refused, locked(run, "comparison"):
            pass
        told = f"in {run} (process {os.getpid()} on {platform.node()}, since {note['since']})"
        assert told in str(refused.value)
        assert "wait until it ends, or stop it" in str(refused.value)
        (run / LOCK).write_text("{")  # a note that cannot be read is left out
        with pytest.raises(ValueError, match=r"at work in .*run; wait"), locked(run):
            pass
        (run / "fit.json").touch()
    assert os.listdir(run) == ["fit.json"]
    with locked(run):
        pass


def test_other_processes_are_refused_and_a_killed_one_holds_nothing(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(ValueError, match=rf"\(process {process.pid} on"), locked(tmp_path):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / LOCK).exists()  # left over, and in nobody's way
    with locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_that_outlive_a_killed_trainer_do_not_keep_its_lock(tmp_path):
    process = holder(tmp_path, "fork")
    process.kill()
    process.wait()
    try:
        with locked(tmp_path):
            os.killpg(process.pid, 0)  # the worker is still there
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_one_of_many_that_start_at_once_gets_it(tmp_path):
    """In a folder that is not there yet, and that each but the first would remove again."""
    code = (
        "import sys, time; from hubpath_fast.locks import locked\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "try:\n"
        "    with locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()\n"
        "except ValueError: print('refused', flush=True)\n"
    )
    begin = str(time.time() + 6)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "a" / "b"), begin],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    said = sorted(process.stdout.readline().strip() for process in processes)
    for process in processes:
        process.communicate()
    assert said == ["held", "refused", "refused", "refused"]
    assert os.listdir(tmp_path) == []


def test_what_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ValueError, match="no such data"), locked(tmp_path / "a" / "b"):
        raise ValueError("no such data")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    refusal = pytest.raises(ValueError, match=r"out: .*file is a file; give a folder")
    with refusal, locked(tmp_path / "file"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_no_obstacle(tmp_path, monkeypatch, number):
    def none(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_lock", none)
    console = Console(record=True, width=1000)
    with locked(tmp_path, console=console):
        assert os.listdir(tmp_path) == []
    text = console.export_text()
    assert f"note {tmp_path} cannot be locked ({os.strerror(number)}): see to it that" in text


def test_unfinished_files_of_a_killed_process_are_cleared_away(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from hubpath_fast.files import *\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = write_bytes(tmp_path / "fit.json", b"whole")
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(os.listdir(tmp_path)) == 2
    with locked(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [LOCK, "fit.json"]
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("made", [0, 1, 2])
def test_who_has_the_lock_removes_what_another_made_for_it(tmp_path, made):
    """One that was refused had made the folder, and says so; a folder of the user's stays."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    if made:
        (folder / MADE).write_text(str(made))
    with locked(folder):
        pass
    assert not (folder / MADE).exists()
    assert [p.exists() for p in (folder, folder.parent)] == [made < 1, made < 2]
