"""Processes that decode images and fail: what torch raises of them, in one sentence.

A worker that is killed is an error that torch raises wherever the main process happens to be, from
a handler of SIGCHLD: in midst of a backward pass as well as where it waits for a batch. So it is
told by its message, at the places that know what a user can do: where batches are read, around a
whole training, and in the command line.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

NEWS_SECONDS = 5.0  # that a worker's end may be behind the end of its connections
REMEDY = "--workers 0 decodes without them, and fewer of them need less"

# Texts of torch's errors, and what they mean. {}: what the first group found.
CAUSES = {
    r"worker \(pid.*\) is killed by signal: Bus error": "a process that decodes images was killed "
    "(Bus error): shared memory, through which batches travel, is full. Give it more (docker run "
    "--shm-size 8g, or --ipc host)",
    r"worker \(pid.*\) is killed by signal: Killed": "a process that decodes images was killed, as "
    "the operating system does when memory runs out. Free memory",
    r"worker \(pid.*\) is killed by signal: ([^.]*)": "a process that decodes images crashed ({}), "
    "perhaps on a broken image: `hubpath data check --decode` reads them all",
    r"worker \(pid.*\) exited unexpectedly|Pin memory thread exited": "a process that decodes "
    "images exited unexpectedly; most often it was killed for want of memory. Free memory",
    r"(?:allocate shared memory|write to file </torch|shared memory object).*"
    r"(?:No space|Cannot allocate)": "shared memory, through which batches travel, is full. Give "
    "it more (docker run --shm-size 8g, or --ipc host)",
    r"Too many open files. Communication|items of ancdata": "too many files are open for "
    "batches to travel between processes. Allow more (ulimit -n 65536)",
    r"Caught MemoryError in DataLoader|in DataLoader worker[^$]*can't allocate memory": "a process "
    "that decodes images found no memory. Free memory",
    r"can't start new thread": "no further thread can be started to read batches. End other "
    "programs, or allow more (ulimit -u)",
}


class WorkerFailure(ChildProcessError, RuntimeError):
    """A process that decodes images was killed, could not be started, or cannot be reached.

    A RuntimeError, as torch's is, and an OSError: the system's doing, no bug."""


def worker_failure(error: BaseException) -> WorkerFailure | None:
    """What an error says of the processes that decode images; None if it is of something else."""
    if isinstance(error, WorkerFailure):
        return error
    if not isinstance(error, (RuntimeError, MemoryError, OSError)):
        return None
    # Where torch was waiting for a batch, what its handler said of the signal is the cause.
    text = f"{error.__cause__ or ''}\n{error}"
    for pattern, words in CAUSES.items():
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return WorkerFailure(f"{words.format(*match.groups())}; {REMEDY}")
    return None


def forget_frames(error: BaseException | None) -> None:
    """Frames hold a loader in a cycle; ended by the collector, its workers take 5 s each."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def cut_off(error: Exception) -> WorkerFailure | None:
    """Of a connection to a worker that broke; None if the error is of something else.

    The worker's end, of which torch has not heard yet, would be raised in midst of what comes next.
    So it is waited for, and says more.
    """
    broken = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if not broken or "in DataLoader worker process" in str(error):  # not of the connection
        return None
    try:
        time.sleep(NEWS_SECONDS)
    except RuntimeError as news:
        return worker_failure(news)
    return worker_failure(RuntimeError("worker (pid ?) exited unexpectedly"))


def not_started(error: Exception) -> WorkerFailure:
    """Of an error with which a DataLoader did not start."""
    return WorkerFailure(
        f"the processes that decode images cannot be started ({error}). Free memory, or end other "
        f"programs; {REMEDY}"
    )


@contextmanager
def worker_failures() -> Iterator[None]:
    """Raises a WorkerFailure in place of torch's errors of the processes that decode images."""
    try:
        yield
    except Exception as error:
        failure = worker_failure(error)
        if failure is None or failure is error:
            raise
        forget_frames(error)
    else:
        return
    try:
        raise failure
    finally:
        del failure  # else this frame and the error hold each other
