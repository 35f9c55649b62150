"""Experts that rest in the host's memory and come to a device: tensors move, and stay objects.

What comes and goes together lies in one piece of memory (``Block``), so that one copy brings it. A
tensor is always where its ``data`` is: on the device, or at home. So optimizers, checkpoints and
whoever holds it need not know, as long as they look at it again after an expert has left. What was
written on the device is copied back before its memory goes; what was not is let go. Nobody waits
for these copies one by one: a tensor is at home as soon as its copy is given to the device, and may
be read there after ``arrive``. The executor calls that before it returns, and whoever else has one
go home does.

A home is pinned memory, or a saved model's mapped file until something is written to it: from there
the bytes go through staging memory, and pages of the file leave as soon as they were read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ... import resting
from ...resting import SavedFile, padded, view_of
from .transfers import Transfers


class Block:
    """Tensors that come and go together. memory: of the device, while they are there. written:
    says that their values there are to be kept; writes that torch counts are noticed anyway."""

    def __init__(
        self, tensors: Sequence[Tensor], transfers: Transfers, files: Sequence[SavedFile] = ()
    ):
        self.tensors, self._transfers = list(tensors), transfers
        self._starts, self.nbytes = [], 0
        for tensor in self.tensors:
            self._starts.append(self.nbytes)
            self.nbytes += padded(tensor.nbytes)
        self.memory: Tensor | None = None
        self.written, self._arrived, self._versions = False, None, []
        self._pinned: Tensor | None = None  # of all of them; None while any are in files
        self._ids = set(map(id, self.tensors))
        self._files = [f for f in files if any(map(f.holds, self.tensors))]
        if self._files:
            inside = [any(f.holds(t) for f in self._files) for t in self.tensors]
            homes = zip(self.tensors, inside, strict=True)
            self._homes = [t.detach() if there else t.detach().cpu().clone() for t, there in homes]
        else:
            self._pin_all(self.tensors)
        self._go_to(self._homes)

    def intact(self) -> bool:
        return self._addresses == [t.data_ptr() for t in self.tensors]

    def holds_any(self, tensors: Iterable[Tensor]) -> bool:
        return not self._ids.isdisjoint(map(id, tensors))

    def fetch(self) -> None:
        """Starts to bring them. Raises OSError naming a file that is not what was opened."""
        if self.memory is not None or not self.tensors:
            return
        for file in self._files:
            file.fetch()
        memory = self._transfers.memory(self.nbytes)
        if self._pinned is not None:
            self._arrived = self._transfers.bring(memory, self._pinned)
        else:
            with self._transfers.staging(self.nbytes) as staging:
                for view, home in zip(self._views(staging), self._homes, strict=True):
                    view.copy_(home)
                self._arrived = self._transfers.bring(memory, staging)
        self._go_to(self._views(memory))
        self.memory = memory
        self._versions = self._written_to()

    def use(self) -> None:
        """The current stream uses them from now on."""
        if self.memory is not None:
            self._transfers.use(self.memory, self._arrived)

    def home(self) -> None:
        """Lets go of the device's memory; what was written there is being copied back."""
        if self.memory is None:
            return
        if self.written or self._versions != self._written_to():
            if self._pinned is None:
                self._pin_all()
            self.use()  # the copy that brought them, where nobody has waited for it
            self._transfers.send(self._pinned, self.memory)
        self._go_to(self._homes)
        self.memory, self.written, self._arrived = None, False, None

    @property
    def files(self) -> list[SavedFile]:
        """That some of them rest in."""
        return self._files

    def leave_files(self) -> None:
        """They rest elsewhere from now on, with the values that they have at home."""
        if self._files:
            self._pin_all(self._homes)
            if self.memory is None:
                self._go_to(self._homes)

    def addresses(self) -> set[int]:
        """Of the storages that they are in, or go to."""
        return {t.untyped_storage().data_ptr() for t in (*self.tensors, *self._homes)}

    def _written_to(self) -> list[int]:
        """Torch's counters of writes in place."""
        return [0 if t.is_inference() else t._version for t in self.tensors]

    def _pin_all(self, values: Sequence[Tensor] = ()) -> None:
        """Homes in one piece of pinned memory, laid out as on the device. values: to go there."""
        self._files, self._homes = [], []
        if self.tensors:
            self._pinned = self._transfers.host(self.nbytes)
            self._homes = self._views(self._pinned)
        for home, value in zip(self._homes, values, strict=bool(values)):
            if value.is_cuda:
                self._transfers.send(home, value.detach())
            else:
                home.copy_(value.detach())

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            view_of(memory.untyped_storage(), start, t, t.dtype)
            for start, t in zip(self._starts, self.tensors, strict=True)
        ]

    def _go_to(self, places: Sequence[Tensor]) -> None:
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place
        self._addresses = [t.data_ptr() for t in self.tensors]


class DevicePlace:
    """Where one expert rests, with what optimizers keep of it: as ``resting.Place``, on a device.

    held: whether its trained parameters stay, though the rest may leave: they have, or are to get,
    gradients, which lie on the device.
    """

    def __init__(
        self, tensors: Iterable[Tensor], transfers: Transfers, files: Sequence[SavedFile] = ()
    ):
        _watch_optimizers()
        self.tensors = [t for t in tensors if t.numel() and not t.is_meta]
        self.nbytes = sum(t.nbytes for t in self.tensors)
        self.state_nbytes, self.copies, self.wanted, self.held = 0, 0, False, False
        self.files = list(files)
        self._transfers, self._lock = transfers, threading.RLock()
        self._state: list[Block] = []
        self._registered: set[int] = set()
        self._group()

    def _group(self) -> None:
        """What is trained, buffers, and what is frozen: only what is written goes back."""
        self._trains = [t.requires_grad for t in self.tensors]
        trained = [t for t in self.tensors if t.requires_grad]
        buffers = [t for t in self.tensors if not isinstance(t, torch.nn.Parameter)]
        others = {id(t) for t in (*trained, *buffers)}
        frozen = [t for t in self.tensors if id(t) not in others]
        self._trained, self._buffers, self._frozen = self._blocks = [
            Block(each, self._transfers, self.files) for each in (trained, buffers, frozen)
        ]
        self._register()

    @property
    def here(self) -> bool:
        """Whether all of it is on the device, or on its way."""
        return all(block.memory is not None for block in self._blocks if block.tensors)

    def intact(self) -> bool:
        return all(block.intact() for block in self._blocks)

    def make_writable(self, tensors: Sequence[Tensor]) -> None:
        """Says that those will be written on the device."""
        with self._lock:
            if self._trains != [t.requires_grad for t in self.tensors]:
                self.home()
                self.arrive()
                self._group()
            for block in self._blocks:
                block.written |= block.holds_any(tensors)

    def leave_files(self) -> None:
        """As of ``resting.Place``."""
        with self._lock:
            self.check()
            for block in self._blocks:
                block.leave_files()
            self._register()

    def check(self) -> None:
        """Raises OSError naming a file that is not what was opened."""
        for block in self._blocks:
            for file in block.files:
                file.check()

    def new_state(self) -> None:
        """What is kept is looked up at every update."""

    def zeros_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """What an optimizer keeps of one of its tensors: made where that one is."""
        return torch.zeros_like(tensor, dtype=dtype)

    @torch.inference_mode(False)
    def fetch(self) -> None:
        """Starts to bring what is not there. Raises OSError naming a file that is not what was
        opened."""
        with self._lock:
            try:
                for block in self._blocks:
                    block.fetch()
            except OSError:
                self.drop()
                self.arrive()
                raise
            self._release_files()
            self._register()

    def use(self) -> None:
        """The current stream uses it from now on."""
        for block in self._blocks:
            block.use()

    @torch.inference_mode(False)
    def drop(self) -> None:
        """Lets the device's memory go, but for what is held. Until ``arrive`` what was written may
        be on its way, and is not to be read."""
        with self._lock:
            leaving = [self._buffers, self._frozen]
            if not self.held:
                leaving += [self._trained, *self._state]
            for block in leaving:
                block.home()
            self._release_files()
            self._register()

    def home(self) -> None:
        """As ``drop``, of all, whatever is still to be done with it."""
        held, self.held = self.held, False
        self.drop()
        self.held = held

    def arrive(self) -> None:
        """Waits until all that goes home, of any place of the device, is there."""
        self._transfers.arrive()

    @torch.inference_mode(False)
    def before_update(self, optimizer: Optimizer) -> None:
        """What an update of its trained parameters needs is on the device, and is written."""
        with self._lock:
            self._trained.fetch()
            self._trained.use()
            self._trained.written = True
            self._follow(optimizer)
            for block in self._state:
                block.fetch()
                block.use()
                block.written = True
            self._register()

    def _follow(self, optimizer: Optimizer) -> None:
        """What the optimizer keeps, as of now, comes and goes with the parameters."""
        kept, fused = [], {id(p) for g in optimizer.param_groups if g.get("fused")
                           for p in g["params"]}  # fmt: skip
        for tensor in self._trained.tensors:
            for value in optimizer.state.get(tensor, {}).values():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    kept.append(value)
                elif isinstance(value, Tensor) and id(tensor) in fused:
                    value.data = value.to(tensor.device)
        known = {id(t) for block in self._state for t in block.tensors}
        if known != set(map(id, kept)) or not all(block.intact() for block in self._state):
            for block in self._state:
                block.home()
            if self._state:
                self.arrive()
            self._state = [Block(kept, self._transfers)]
            self.state_nbytes = sum(t.nbytes for t in kept)

    def _release_files(self) -> None:
        """Lets the files' pages go; what was written to them at home is kept elsewhere."""
        files = {id(f): f for block in self._blocks for f in block.files}.values()
        if any(file.written() for file in files):
            for block in self._blocks:
                block.leave_files()
        for file in files:
            file.drop()

    def untrained_memory(self) -> set[int]:
        """Addresses of the device's memory that leaves though gradients are to come."""
        blocks = (self._buffers, self._frozen)
        return {b.memory.untyped_storage().data_ptr() for b in blocks if b.memory is not None}

    def _register(self) -> None:
        """Whoever asks by a tensor's memory finds this place, wherever that is now."""
        addresses = set().union(*(block.addresses() for block in self._blocks))
        resting.register(self, addresses, self._registered - addresses)
        self._registered = addresses


@lru_cache
def _watch_optimizers() -> None:
    """Has any optimizer's update find what it needs on the device."""

    def before(optimizer: Optimizer, *_: object) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        found = {id(place): place for p in params if p.grad is not None
                 if isinstance(place := resting.place_of(p), DevicePlace)}  # fmt: skip
        for place in found.values():
            place.before_update(optimizer)

    register_optimizer_step_pre_hook(before)
