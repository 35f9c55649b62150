"""A few threads that run experts side by side on a CPU, and what they take over from the caller."""

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

T = TypeVar("T")


class Workers:
    """``count`` threads, among which torch's own (``torch.get_num_threads()``) are divided."""

    def __init__(self, count: int):
        self._count, self._total = count, torch.get_num_threads()
        self._process = os.getpid()
        each = max(1, self._total // count)
        ready = threading.Barrier(count)

        def start() -> None:
            torch.get_num_threads()  # a thread's first use of torch sets its number; then it stays
            torch.set_num_threads(each)
            ready.wait()

        self._pool = ThreadPoolExecutor(count, "hubpath-expert", start)
        wait([self._pool.submit(int) for _ in range(count)])
        # It is a number of the thread that sets it, but also that of threads that start later.
        torch.set_num_threads(self._total)

    @property
    def fit(self) -> bool:
        """Whether they are threads of this process, and divide the number that holds now."""
        return self._process == os.getpid() and self._total == torch.get_num_threads()

    def run(self, tasks: Sequence[Callable[[], T]], order: Sequence[int]) -> list[T]:
        """The results of the tasks, which are begun in ``order``, as threads get free.

        All that were begun have ended when it returns or raises. After an exception no more begin;
        of several it raises the first task's.
        """
        # One future a thread, and a queue to wait on: wait() costs as much as a small task.
        pending, ended = deque(order), SimpleQueue()
        results: list[T | None] = [None] * len(tasks)
        raised: dict[int, BaseException] = {}

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    i = pending.popleft()
                    try:
                        results[i] = tasks[i]()
                    except BaseException as error:
                        raised[i] = error
                        pending.clear()
            ended.put(None)

        futures = [self._pool.submit(work) for _ in range(min(self._count, len(tasks)))]
        try:
            for _ in futures:
                ended.get()
        except BaseException:  # Ctrl-C
            pending.clear()
            wait(futures)
            raise
        if raised:
            raise raised[min(raised)]
        return results


def obstacle() -> str | None:
    """What of the caller's state other threads would not see; None: nothing that counts."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the step is being traced"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode of torch (a counter of operations, a default device) is active"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "saved_tensors_hooks are active"
    return None


def caller_autocast() -> Callable[[], contextlib.AbstractContextManager]:
    """Makes contexts that give another thread this one's autocast."""
    dtype = HF.autocast_dtype("cpu")
    if dtype is None:
        return contextlib.nullcontext
    # The cache of casts belongs to the caller, who empties it.
    return lambda: torch.autocast("cpu", dtype, cache_enabled=False)
