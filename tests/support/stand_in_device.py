"""A stand-in for a device whose copies are late: all in the CPU's memory, and as CUDA orders it.

A copy is done when somebody waits for its stream, no sooner; new memory of the device is all ones,
which are no numbers. So what is used without waiting, or overwritten too early, is wrong by value.
"""

import contextlib
import threading
import weakref

import torch
from torch import Tensor, nn

from hubpath_fast.executors.resident import executor
from hubpath_fast.executors.resident.transfers import Transfers


class LateStream:
    """done: how many of its operations are."""

    def __init__(self, device=None):
        self._waiting, self.done, self.given = [], 0, 0
        self._lock = threading.RLock()

    def enqueue(self, function):
        with self._lock:
            self._waiting.append(function)
            self.given += 1

    def run(self, until):
        with self._lock:
            while self.done < until:
                self._waiting.pop(0)()
                self.done += 1

    def record_event(self):
        event = LateEvent()
        event.record(self)
        return event

    def wait_event(self, event):
        event.synchronize()

    def wait_stream(self, other):
        other.synchronize()

    def synchronize(self):
        self.run(self.given)


class LateEvent:
    def __init__(self, enable_timing=False):
        self._stream, self._at = None, 0

    def record(self, stream=None):
        self._stream = torch.cuda.current_stream() if stream is None else stream
        self._at = self._stream.given

    def synchronize(self):
        self._stream.run(self._at)

    def query(self):
        return self._stream.done >= self._at

    def elapsed_time(self, other):
        return 1.0


class LateTransfers(Transfers):
    """peak: the most bytes of the device that were taken at once; copied: bytes, in all. used:
    whether memory of the device at an address was waited for."""

    def __init__(self, monkeypatch):
        self._now = threading.local()
        self._compute = LateStream()
        cuda = {
            "Stream": LateStream,
            "Event": LateEvent,
            "stream": self._on,
            "current_stream": lambda device=None: getattr(self._now, "stream", self._compute),
            "get_rng_state": lambda device=None: torch.get_rng_state(),
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        super().__init__(torch.device("cpu"))
        self.taken = self.peak = self.copied = self.staged = 0
        self.addresses = set()

    @contextlib.contextmanager
    def _on(self, stream):
        before = getattr(self._now, "stream", self._compute)
        self._now.stream = stream
        try:
            yield
        finally:
            self._now.stream = before

    def host(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    def staging(self, nbytes):
        self.staged += 1
        return super().staging(nbytes)

    def memory(self, nbytes):
        memory = super().memory(nbytes).fill_(255)
        self.taken += nbytes
        self.peak = max(self.peak, self.taken)
        address = memory.untyped_storage().data_ptr()
        self.addresses.add(address)
        weakref.finalize(memory, self._freed, nbytes, address)
        return memory

    def _freed(self, nbytes, address):
        self.taken -= nbytes
        self.addresses.discard(address)

    def _copy(self, to, of):
        self.copied += to.nbytes
        torch.cuda.current_stream().enqueue(lambda: to.copy_(of))

    def finish(self):
        """All copies, also those that nobody waits for: until then they keep their memory."""
        self._copying.synchronize()

    def watch(self, expert: nn.Module):
        """From now on the expert may be run only while all of it is on the device, and its
        parameters may get gradients only there."""

        def there(*_):
            tensors = [t for t in (*expert.parameters(), *expert.buffers()) if t.numel()]
            assert all(t.untyped_storage().data_ptr() in self.addresses for t in tensors)

        def is_there(parameter):
            assert parameter.untyped_storage().data_ptr() in self.addresses

        expert.register_forward_pre_hook(there)
        for parameter in filter(lambda p: p.requires_grad, expert.parameters()):
            parameter.register_hook(lambda _, p=parameter: is_there(p))


def on_stand_in(model: nn.Module, monkeypatch) -> LateTransfers:
    """Has a model with a resident executor run its experts on such a device."""
    transfers = LateTransfers(monkeypatch)
    monkeypatch.setattr(executor, "transfers_for", lambda device: transfers)
    model.executor._device = torch.device("meta")  # so that the CPU is another
    model.executor.go_to(torch.device("cpu"))
    for expert in model.experts:
        transfers.watch(expert)
    return transfers
