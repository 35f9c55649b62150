"""Threads that run experts on a CPU, and what they take over from the caller."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import TypeVar

import torch

from ... import functional as HF
from .. import torch_private

T = TypeVar("T")
MAX_SHARE = 0.5  # of all rows: what one of several concurrent experts may have


def divide(counts: Sequence[int], threads: int) -> list[int]:
    """How many of torch's ``threads`` each expert gets, for experts with ``counts`` rows each that
    run concurrently: as many at once as there are threads, or experts, if those are fewer.

    All get as many; what is left over goes to those with most rows, one each. Empty, where it
    is better to run them one after another on all threads: one expert has more than half of the
    rows. Alone it would take as long as all of them do so (two threads run one 1.5 times as fast).
    """
    if threads == 1 or not counts or max(counts) > MAX_SHARE * sum(counts):
        return []
    each, left = divmod(threads, min(threads, len(counts)))
    largest = sorted(range(len(counts)), key=lambda i: -counts[i])[:left]
    return [each + (i in largest) for i in range(len(counts))]


class ThreadPools:
    """Worker threads among which ``total`` of torch's threads are divided.

    A worker's number of torch's threads is set once, when it starts: there is a pool for each
    number that was asked for, and all are kept.
    """

    def __init__(self, total: int):
        self._total, self._process = total, os.getpid()
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def fit(self, total: int) -> bool:
        """Whether they divide that number, and are threads of this process (not of its parent)."""
        return self._total == total and self._process == os.getpid()

    def run(
        self, tasks: Sequence[Callable[[], T]], threads: Sequence[int], order: Sequence[int]
    ) -> list[T]:
        """The results of the tasks, the i-th of which runs on ``threads[i]`` of torch's threads, as
        ``divide`` says. They are begun in ``order``, as workers get free.

        All that were begun have ended when it returns or raises. After an exception no more begin;
        of several it raises the first task's.
        """
        # A queue to wait on: waiting for futures costs as much as a small task.
        pending, ended = {each: deque() for each in set(threads)}, SimpleQueue()
        for i in order:
            pending[threads[i]].append(i)
        results: list[T | None] = [None] * len(tasks)
        raised: dict[int, BaseException] = {}
        changed, running = threading.Condition(), set()

        def cancel() -> None:
            with changed:
                for queue in pending.values():
                    queue.clear()

        def begin(queue: deque[int]) -> int | None:
            with changed:
                if not queue:
                    return None
                running.add(queue[0])
                return queue.popleft()

        def work(queue: deque[int]) -> None:
            while (i := begin(queue)) is not None:
                try:
                    results[i] = tasks[i]()
                except BaseException as error:
                    raised[i] = error
                    cancel()
                with changed:
                    running.remove(i)
                    changed.notify()
            ended.put(None)

        workers = 0
        try:
            for each, queue in pending.items():
                pool = self._pool(each)
                for _ in range(min(self._count(each), len(queue))):
                    pool.submit(work, queue)
                    workers += 1
            for _ in range(workers):
                ended.get()
        except BaseException:  # Ctrl-C, at any moment: also when a worker has just been begun
            cancel()
            with changed:
                changed.wait_for(lambda: not running)
            raise
        if raised:
            raise raised[min(raised)]
        return results

    def _count(self, each: int) -> int:
        return max(1, self._total // each)

    def _pool(self, each: int) -> ThreadPoolExecutor:
        """Workers that use ``each`` of torch's threads: as many as there can be."""
        if each not in self._pools:
            before, count = torch.get_num_threads(), self._count(each)
            ready = threading.Barrier(count)

            def start() -> None:
                torch.get_num_threads()  # a thread's first use of torch sets its number
                torch.set_num_threads(each)
                with contextlib.suppress(threading.BrokenBarrierError):
                    ready.wait()

            pool = ThreadPoolExecutor(count, "hubpath-expert", start)
            try:
                wait([pool.submit(int) for _ in range(count)])
            except BaseException:  # Ctrl-C: those that wait for the others would do so for ever
                ready.abort()
                pool.shutdown()
                raise
            finally:
                # A number of the thread that sets it, but also that of threads that start later.
                torch.set_num_threads(before)
            self._pools[each] = pool
        return self._pools[each]


def obstacle() -> str | None:
    """What of the caller's state other threads would not see; None: nothing that counts."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the step is being traced"
    if torch_private.has_modes():
        return "a mode of torch (a counter of operations, a default device) is active"
    if torch_private.has_function_transforms():
        return "a transform of torch.func is active"
    if torch_private.has_saved_tensors_hooks():
        return "saved_tensors_hooks are active"
    return None


def caller_autocast() -> Callable[[], contextlib.AbstractContextManager]:
    """Makes contexts that give another thread this one's autocast."""
    dtype = HF.autocast_dtype("cpu")
    if dtype is None:
        return contextlib.nullcontext
    # The cache of casts belongs to the caller, who empties it.
    return lambda: torch.autocast("cpu", dtype, cache_enabled=False)
