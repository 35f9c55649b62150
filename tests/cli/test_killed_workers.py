"""A process that decodes images and is killed, or not to be had: one message, and a whole run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command import hubpath
from support.source_trees import image
from support.waiting import LIMIT, wait_until

from hubpath_fast.data import EvalBatches, ImageDataset, eval_transform, open_images, splits
from hubpath_fast.training import load_state
from hubpath_fast.worker_failure import WorkerFailure, cut_off, worker_failure, worker_failures

FIT = ["fit", "--hub", "test_resnet,test_resnet", "--no-pretrained", "--image-size", "32",
       "--batch-size", "8"]  # fmt: skip
KILLED = (
    "failed: a process that decodes images was killed, as the operating system does when memory "
    "runs out. Free memory; --workers 0 decodes without them, and fewer of them need less"
)
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 20), ("val", 6), ("test", 6)):
        for label in ("a", "b"):
            for i in range(count):
                image(root / split / label / f"{i}.png", (40, 30))
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    hubpath(*FIT, "--data", folder, "--steps", 2, "--workers", 1, "--out", out)
    return out


def children(parent):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@linux
def test_a_killed_worker_of_a_training_is_one_message_and_the_run_goes_on(folder, tmp_path):
    out = tmp_path / "run"
    options = [*FIT, "--data", folder, "--workers", 2, "--save-every", 2, "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-c", "from hubpath_fast.cli import main; main()",
         *map(str, options), "--steps", "4000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    state = out / "last" / "state.pt"
    wait_until(lambda: process.poll() is not None or state.is_file(), "the first checkpoint")
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert said == (
        f"{KILLED}. The checkpoint {out / 'last'} is whole; go on with the same command and "
        f"--resume (--out {out})\n"
    )
    step = load_state(out / "last")["run"]["step"]
    assert step >= 2
    options[options.index("--workers") + 1] = 0
    hubpath("fit", "--out", out, "--resume", "--workers", 0, "--steps", 4000, "--print-config")


@pytest.fixture
def deadly(monkeypatch):
    """deadly(name, kill=None): decoding the image of this name kills the worker that does it."""

    def arm(name, number=signal.SIGKILL):
        here, load = os.getpid(), splits.load_image

        def deadly_load(path):
            if os.getpid() != here and str(path).endswith(name):
                os.kill(os.getpid(), number)
            return load(path)

        monkeypatch.setattr(splits, "load_image", deadly_load)

    return arm


def test_a_worker_that_is_killed_before_the_first_checkpoint(folder, deadly, tmp_path):
    deadly("train/a/3.png")
    options = ["--data", folder, "--steps", 9, "--workers", 1, "--out", tmp_path / "run"]
    said = hubpath(*FIT, *options, status=1).stderr
    assert said == f"{KILLED}. No checkpoint was written yet\n"


@pytest.mark.parametrize("image", ["val/a/3.png", "test/b/2.png"])
def test_a_worker_that_is_killed_in_an_evaluation_of_a_run(folder, deadly, tmp_path, image):
    deadly(image)
    out = tmp_path / "run"
    options = ["--data", folder, "--workers", 1, "--save-every", 1, "--eval-every", 2, "--out", out]
    said = hubpath(*FIT, *options, "--steps", 2, status=1).stderr
    assert said.startswith(f"{KILLED}. The checkpoint {out / 'last'} is whole; go on with ")
    # and so it does, here
    assert "of 12 images" in hubpath("fit", "--out", out, "--resume", "--workers", 0).output


def test_evaluate_says_it_too_and_goes_on_without_workers(run, deadly):
    expected = hubpath("evaluate", run).output
    deadly("test/b/2.png")
    assert hubpath("evaluate", run, status=1).stderr == f"{KILLED}\n"
    assert hubpath("evaluate", run, "--workers", 0).output == expected


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGSEGV, r"crashed \(Segmentation fault\), perhaps on a broken image"),
        (signal.SIGBUS, r"was killed \(Bus error\): shared memory.* is full\. .*--shm-size"),
    ],
)
def test_other_ends_of_a_worker(folder, deadly, number, words):
    deadly("test/b/2.png", number)
    batches = EvalBatches(ImageDataset(open_images(folder).test, eval_transform(32)), 4, 1)
    with pytest.raises(WorkerFailure, match=words), worker_failures():
        list(batches)


@linux
@pytest.mark.parametrize("at", [0, 1])
def test_workers_that_cannot_be_started(folder, tmp_path, monkeypatch, at):
    fork, started, before = os.fork, [], children(os.getpid())

    def limited():
        started.append(1)
        if len(started) > at:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    options = ["--data", folder, "--steps", 9, "--workers", 2, "--out", tmp_path / "run"]
    said = hubpath(*FIT, *options, status=1).stderr
    assert said == (
        "failed: the processes that decode images cannot be started ([Errno 11] Resource "
        "temporarily unavailable). Free memory, or end other programs; --workers 0 decodes without "
        "them, and fewer of them need less. No checkpoint was written yet\n"
    )
    assert set(children(os.getpid())) <= set(before)


ENDED = "images exited unexpectedly; most"
WORKER = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...\nRuntimeError: "
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was killed, as"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), ENDED),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are "
                      "lost due to multiprocessing."), ENDED),
        (RuntimeError("Pin memory thread exited unexpectedly"), ENDED),
        (RuntimeError(f"{WORKER}unable to write to file </torch_7_1_0>: No space left on device "
                      "(28)"), "--shm-size"),
        (RuntimeError(f"{WORKER}unable to allocate shared memory(shm) for file </torch_7_1_0>: "
                      "Cannot allocate memory (12)"), "--shm-size"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."),
         "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError(f"{WORKER}[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 9 bytes."), "found no memory"),
        (MemoryError("Caught MemoryError in DataLoader worker process 0.\n"), "found no memory"),
    ],
)  # fmt: skip
def test_what_torch_says_of_workers_is_one_sentence(error, words):
    failure = worker_failure(error)
    assert re.search(words, str(failure))
    assert "--workers 0" in str(failure)
    assert "\n" not in str(failure)
    assert worker_failure(failure) is failure


@pytest.mark.parametrize(
    ("error", "news", "words"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "Killed", "was killed, as"),
        (
            EOFError("Caught EOFError in pin memory thread for device 0.\n"),
            "Bus error",
            "--shm-size",
        ),
        (FileNotFoundError(2, "No such file"), None, ENDED),
    ],
)
def test_a_connection_that_breaks_waits_for_news_of_its_worker(monkeypatch, error, news, words):
    def sleep(seconds):
        if news is not None:
            raise RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {news}. ")

    monkeypatch.setattr("time.sleep", sleep)
    assert words in str(cut_off(error))
    assert cut_off(ValueError("x")) is None
    own = FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.\n...")
    assert cut_off(own) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError(f"{WORKER}stack expects each tensor to be equal size"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(28, "No space left on device"),
        ValueError("worker (pid 7) exited unexpectedly"),
        MemoryError(),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert worker_failure(error) is None
    with pytest.raises(type(error)) as caught, worker_failures():
        raise error
    assert caught.value is error
