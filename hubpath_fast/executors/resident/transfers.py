"""Copies between the host and a CUDA device that run beside what the device computes.

One stream copies; what it brings is used once the current stream has waited for it. Memory of the
device is taken on the copying stream, and marked when the current one uses it (``record_stream``),
so that the allocator gives it to nobody before that is done. Host memory is pinned: only then
does a copy run by itself. It is mapped and registered in the size that is asked for, where torch's
own pinned memory would take the next power of two.

Copies to the host run beside, too, and the host waits once for all of them (``arrive``). The memory
that they read is freed before: it is given again to what the same stream does later.
"""

from __future__ import annotations

import errno
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PORTABLE = 1  # of cudaHostRegister: pinned for every device


class Transfers:
    """Of one CUDA device. seconds_copying: of the copies to it that have ended; seconds_running: of
    what was timed, as the device counts."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copying = torch.cuda.Stream(device)
        self._staging: deque[Tensor] = deque()
        self._staged: deque[torch.cuda.Event] = deque()
        self._lock = threading.Lock()
        self._sent: torch.cuda.Event | None = None  # the last copy to the host
        self._destinations: list[Tensor] = []
        self._timed: dict[str, deque[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
            "copying": deque(),
            "running": deque(),
        }
        self.seconds_copying, self.seconds_running = 0.0, 0.0

    def host(self, nbytes: int) -> Tensor:
        """Pinned bytes of the host, as long as this very tensor lives. nbytes: 1 or more."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            code = int(runtime.cudaHostRegister(memory.data_ptr(), nbytes, PORTABLE))
        if code:
            raise OSError(
                errno.ENOMEM,
                f"{nbytes:,} bytes of the host's memory cannot be pinned for experts (CUDA error "
                f"{code}); allow more locked memory (ulimit -l), or free some",
            )
        address = memory.data_ptr()
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
        return memory

    def memory(self, nbytes: int) -> Tensor:
        """Bytes of the device."""
        with torch.cuda.stream(self._copying):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @contextmanager
    def staging(self, nbytes: int) -> Iterator[Tensor]:
        """Pinned bytes to write to, which ``bring`` takes within: one of two pieces of memory,
        after the last copy from it."""
        if len(self._staged) == 2:
            self._staged.popleft().synchronize()
        memory = self._staging.popleft() if len(self._staging) == 2 else None
        if memory is None or len(memory) < nbytes:
            memory = self.host(nbytes)
        self._staging.append(memory)
        try:
            yield memory[:nbytes]
        finally:
            self._staged.append(self._copying.record_event())

    def bring(self, there: Tensor, here: Tensor) -> object:
        """Starts to copy bytes of the host to the device; what ``use`` waits for."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._copying):
            start.record()
            self._copy(there, here)
            end.record()
        self._timed["copying"].append((start, end))
        return end

    def use(self, there: Tensor, arrived: object) -> None:
        """From now on the current stream uses what was brought."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        there.record_stream(current)

    def send(self, here: Tensor, there: Tensor) -> None:
        """Starts to copy from the device to the host, after what the current stream does. The
        host may read ``here``, or write to it, after ``arrive``; ``bring`` may take it at once."""
        self._copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copying):
            self._copy(here, there)
            there.record_stream(self._copying)
        with self._lock:
            self._sent = self._copying.record_event()
            self._destinations.append(here)

    def arrive(self) -> None:
        """Waits until all that was sent is there, which is one wait, or none."""
        with self._lock:
            sent, self._sent = self._sent, None
            destinations, self._destinations = self._destinations, []
        if sent is not None:
            sent.synchronize()
        del destinations  # memory that was copied to stays pinned until now

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times what the current stream does within."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        current = torch.cuda.current_stream(self.device)
        start.record(current)
        yield
        end.record(current)
        self._timed["running"].append((start, end))
        self.seconds_copying += self._ended("copying")
        self.seconds_running += self._ended("running")

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def _copy(self, to: Tensor, of: Tensor) -> None:
        """On the current stream, for which nobody waits here."""
        to.copy_(of, non_blocking=True)

    def _ended(self, kind: str) -> float:
        """Seconds of those that ended since they were asked for last; waits for none."""
        timed, found = self._timed[kind], 0.0
        while timed and timed[0][1].query():
            start, end = timed.popleft()
            found += start.elapsed_time(end) / 1000
        return found


def transfers_for(device: torch.device) -> Transfers | None:
    """None for a CPU, where memory goes and comes by itself."""
    return Transfers(device) if device.type == "cuda" else None
