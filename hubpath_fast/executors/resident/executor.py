"""Experts that rest elsewhere and are in the device's memory while they are used.

On a CPU they rest in files (see ``resting``), on CUDA in the host's memory (``on_device``). Around
another executor: experts are run a few at a time, those that are in memory first, while
one thread reads in the next. ``room`` bounds what is there at once; beyond it there are at most the
expert that is run and the one that is read in. Whoever was used least recently leaves first.
Results are those of all experts in memory, to the bit: each is called once, on its own rows, and
where experts draw random numbers, or share parameters that are trained, in their order.

On a CPU, where memory goes by itself, nothing that is computed depends on who is in memory,
so backward passes and the optimizer may touch whom they like. What they do touch has to fit: of
experts that are trained, the trained parameters, their gradients and the optimizer's state count
from the step's forward pass until the gradients are gone, and a step that needs more than the room
is refused before any expert is run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import is_

import torch
from torch import Tensor, nn

from ... import functional as HF
from ...resting import SavedFile, can_rest, own_tensors
from ..base import Executor
from ..groups import Group, expert_name, groups_of, join
from ..of_model import ModelExecutors
from ..rows import RowSource
from .resident import Pass, Resident, on_host, shared_tensors
from .room import Room, read_room
from .rows import SomeRows
from .state import check_state
from .transfers import transfers_for


class ResidentExecutor(Executor):
    """room: bytes such as "8GB", or a number of experts as large as the largest. inner: the name of
    the executor that runs those in memory; "auto" chooses as for a model."""

    name = "resident"

    def __init__(self, room: int | str, inner: str = "auto"):
        super().__init__(room, inner)
        if inner == "graphs":
            raise ValueError(
                "inner: expected 'auto', 'sequential', 'threads' or 'streams', got 'graphs', which "
                "hold the addresses of parameters, and here these come and go"
            )
        self._bytes, self._experts = read_room(room)
        self._asked, self._executors = inner, ModelExecutors()
        self._residents: dict[int, Resident] = {}
        self._of: list[nn.Module] = []
        self._shared: set[int] | None = None
        self._room, self._held = Room(), set()
        self._reader: ThreadPoolExecutor | None = None
        self._reading: dict[int, Future] = {}
        self._process = os.getpid()
        self._k, self._moved = 1, False
        self._device, self._transfers = torch.device("cpu"), None
        self._files: dict[int, list[SavedFile]] = {}

    def check(self, experts: Sequence[nn.Module], k: int) -> None:
        """Raises ValueError where ``k`` experts do not fit, or one cannot come and go."""
        if not can_rest():
            raise ValueError("executor: 'resident' needs a system with madvise, such as Linux")
        check_state(experts)
        self._k = k
        sizes = [sum(t.nbytes for t in own_tensors(expert)) for expert in experts]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if self._experts is not None and self._experts < k:
            raise ValueError(
                f"room: expected at least k={k} experts, got {self._experts}; give more, or lower k"
            )
        if self._bytes is not None and self._bytes < k * sizes[largest]:
            raise ValueError(
                f"room: expected at least {k * sizes[largest]:,} bytes, k={k} times the largest "
                f"expert's {sizes[largest]:,} ({expert_name(experts, largest)}), got "
                f"{self._bytes:,}; give more room, or lower k"
            )

    @torch.inference_mode(False)
    def settle(self, experts: Sequence[nn.Module]) -> None:
        """Moves experts to where they rest, unless they do. OSError where the disk has no room."""
        self._take(experts)
        if self._shared is None:
            self._shared = shared_tensors(experts)
            for index, resident in list(self._residents.items()):
                if not self._shared.isdisjoint(map(id, resident.place.tensors)):
                    del self._residents[index]
        new = [index for index in range(len(experts)) if index not in self._residents]
        for index in new:
            self._settle(index)
        if new:
            self._arrive()

    @torch.inference_mode(False)
    def settle_one(
        self, experts: Sequence[nn.Module], index: int, files: Sequence[SavedFile]
    ) -> None:
        """As ``settle``, while others may have no weights yet. files: of a saved model, in whose
        memory some of its tensors are, and stay."""
        self._take(experts)
        self._settle(index, files)
        self._arrive()

    def go_to(self, device: torch.device) -> None:
        """Experts are run on this device from now on; those that are on another one go home."""
        if device == self._device:
            return
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"executor: 'resident' needs a CPU or CUDA, got {device}")
        for index in list(self._reading):
            self._wait(index)
        for index, resident in self._residents.items():
            resident.place.home()
            self._files[index] = resident.place.files
        self._arrive()
        self._device, self._transfers = device, transfers_for(device)
        self._residents, self._room, self._held = {}, Room(), set()

    def moving(
        self, experts: Sequence[nn.Module], move: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """What ``Module._apply`` does with the model's tensors, by what it is asked to do with each
        of them: experts that go to CUDA stay in the host's memory, in the dtype and layout asked
        for."""
        self._moved = True  # each has to go back to where it rests
        device = move(torch.empty(0, device=self._device)).device
        if device.type not in ("cpu", "cuda"):
            return move
        for resident in self._residents.values():
            resident.place.home()
        self._arrive()
        self.go_to(device)
        shared = shared_tensors(experts)
        own = {id(t) for e in experts for t in own_tensors(e) if not t.is_meta} - shared
        return lambda tensor: on_host(move, tensor) if id(tensor) in own else move(tensor)

    def _take(self, experts: Sequence[nn.Module]) -> None:
        if len(experts) != len(self._of) or not all(map(is_, experts, self._of)):
            self.check(experts, min(self._k, len(experts)))
            self._of, self._residents, self._room = list(experts), {}, Room()
            self._shared, self._files = None, {}

    def _settle(self, index: int, files: Sequence[SavedFile] = ()) -> None:
        files = [*files, *self._files.pop(index, ())]
        resident = Resident(self._of[index], self._shared or set(), files, self._transfers)
        resident.place.drop()
        self._residents[index] = resident
        self._room.leave(index)

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        if self._process != os.getpid():  # forked, without the thread that reads
            self._process, self._reader, self._reading = os.getpid(), None, {}
        for index in list(self._reading):  # of a step that failed
            self._wait(index)
        self.go_to(source.x.device)
        try:
            with nullcontext() if self._transfers is None else self._transfers.running():
                return self._run(experts, source, min_group)
        finally:
            self._arrive()

    def _run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        groups = groups_of(source.routing)
        self.settle(experts)
        if torch.is_grad_enabled():
            for resident in self._residents.values():
                resident.look()
        active = {group.index for group in groups}
        looked, self._moved = range(len(experts)) if self._moved else active, False
        for index in looked:
            if not self._residents[index].intact():
                self._shared = shared_tensors(experts)
                with torch.inference_mode(False):
                    self._settle(index)
        self._hold(active)
        for index in active:
            with self._naming(index):
                self._residents[index].get_ready(experts[index])
        inner = self._executors(self._inner(), experts, source.routing.k, source.x)
        rows, outputs = source.rows(), {}
        chunks = self._chunks(groups, inner)
        for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
            active = [group.index for group in chunk]
            self._enter(active)
            self._read_ahead(following, active)
            before = self._random_state()
            with self._kept_for_backward(active):
                joined = inner.run(experts, SomeRows(source, rows, chunk), min_group)
            if HF.autocast_dtype(source.x.device.type) is not None:
                torch.clear_autocast_cache()  # which has copies of those that leave
            drew = not torch.equal(before, self._random_state())
            for index in active:
                self._residents[index].drew(experts[index].training, drew)
            if joined.requires_grad:
                this = Pass()
                joined.register_hook(partial(self._in_backward, active, this))
                for index in active if self._transfers is not None else ():
                    self._residents[index].expect_gradients(this)
            own = joined.split([group.count for group in chunk])
            outputs |= dict(zip(active, own, strict=True))
        self._note(inner)
        return join(experts, groups, [outputs[group.index] for group in groups])

    def _arrive(self) -> None:
        """Whoever reads an expert that has left finds its values."""
        if self._transfers is not None:
            self._transfers.arrive()

    def _inner(self) -> str:
        """On a device one after another by itself: the next comes meanwhile, and one copy at a time
        is all that its link to the host does faster than many."""
        return "sequential" if self._asked == "auto" and self._transfers else self._asked

    def _random_state(self) -> Tensor:
        """Of what experts draw from."""
        return torch.get_rng_state() if self._transfers is None else self._transfers.random_state()

    @contextmanager
    def _kept_for_backward(self, active: Sequence[int]) -> Iterator[None]:
        """What the backward pass needs of parameters that are not trained, and of buffers, stays on
        the device until then, though the expert leaves."""
        if self._transfers is None or not torch.is_grad_enabled():
            yield
            return
        found: set[int] = set()
        leaving = {i: self._residents[i].place.untrained_memory() for i in active}
        every = set().union(*leaving.values())

        def keep(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in every:
                return tensor
            found.add(address)
            return tensor.detach()  # not the parameter, whose memory will be another

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        for index, addresses in leaving.items():
            self._residents[index].keeps = not found.isdisjoint(addresses)

    def _chunks(self, groups: list[Group], inner: Executor) -> list[list[Group]]:
        """What is run at once, in order."""
        ordered = groups
        if self._may_reorder(groups):
            ordered = sorted(groups, key=lambda group: group.index not in self._room)
        if inner.name == "sequential":
            return [[group] for group in ordered]
        chunks, used, capacity = [[]], 0, self._capacity()
        for group in ordered:
            nbytes = self._size(group.index)
            if chunks[-1] and used + nbytes > capacity:
                chunks.append([])
                used = 0
            chunks[-1].append(group)
            used += nbytes
        for chunk in chunks:
            chunk.sort(key=lambda group: group.index)
        return chunks

    def _may_reorder(self, groups: list[Group]) -> bool:
        """Whether results are the same to the bit in any order."""
        training = any(self._of[group.index].training for group in groups)
        if training or (torch.is_grad_enabled() and self._shared):
            return False
        draws = (self._residents[g.index].draws(self._of[g.index].training) for g in groups)
        return all(each is False for each in draws)

    def _hold(self, active: set[int]) -> None:
        """Reserves what training keeps of experts until their gradients are gone. ValueError."""
        training = torch.is_grad_enabled()
        for index in [i for i in self._held if not self._residents[i].has_gradients()]:
            self._held.discard(index)
            self._residents[index].place.held = False
            if index in self._room and training:
                self._room.resize(index, self._size(index))
            else:  # predictions have room for the parameters alone
                self._room.leave(index)
                self._residents[index].place.wanted = False
                self._residents[index].place.drop()
        if not training:
            return
        held = self._held | {i for i in active if self._residents[i].trained_nbytes}
        needed, room = sum(self._residents[i].held_nbytes for i in held), self._whole_room()
        if needed > room and not any(self._of[i].training for i in active):
            raise ValueError(
                f"room: expected at least {needed:,} bytes for a prediction that records gradients "
                f"of {len(held)} experts, got {room:,}; predict within torch.inference_mode(), or "
                "use a larger room"
            )
        if needed > room:
            raise ValueError(
                f"room: expected at least {needed:,} bytes, which the {len(held)} experts that are "
                f"trained in this step take until its update (parameters, gradients and the "
                f"optimizer's state), or until zero_grad() sets their gradients to None, got "
                f"{room:,}; use a larger room, fewer samples per batch, or freeze the experts' "
                "bodies (freeze=body)"
            )
        self._held = held
        for index in held:
            self._residents[index].place.held = True

    def _whole_room(self) -> int:
        if self._bytes is not None:
            return self._bytes
        training = torch.is_grad_enabled()
        return self._experts * max(each.footprint(training) for each in self._residents.values())

    def _capacity(self) -> int:
        """The room without what is reserved."""
        return self._whole_room() - sum(self._residents[i].held_nbytes for i in self._held)

    def _size(self, index: int) -> int:
        """Bytes of an expert in the room, but for what is reserved of it."""
        resident = self._residents[index]
        if index in self._held:
            return resident.size_while_held
        state = resident.place.state_nbytes if torch.is_grad_enabled() else 0
        return resident.place.nbytes + state

    def _let_in(self, index: int, stay: Sequence[int]) -> None:
        for gone in self._room.enter(index, self._size(index), self._capacity(), stay):
            place = self._residents[gone].place
            place.wanted = False
            self._wait(gone)
            place.drop()
            self.counters.bytes_out += place.nbytes + place.state_nbytes
        self._residents[index].place.wanted = True

    def _enter(self, active: Sequence[int]) -> None:
        """Experts come into memory, if they are not in it, and nobody of them leaves."""
        for index in active:
            ahead = index in self._reading
            present = index in self._room and not ahead and self._residents[index].place.here
            self.counters.hits += present
            self.counters.misses += not present
            self._let_in(index, active)
            try:
                if present:
                    with self._naming(index):
                        self._residents[index].place.check()
                else:
                    start = time.perf_counter()
                    if ahead:
                        self._wait(index, named=True)
                    else:
                        self._fetch(index)
                    self.counters.seconds_waited += time.perf_counter() - start
            except OSError:
                self._room.leave(index)
                self._residents[index].place.wanted = False
                raise
            self._residents[index].place.use()

    def _read_ahead(self, groups: Sequence[Group], active: Sequence[int]) -> None:
        """Starts to read in the first of these that is not in memory."""
        for group in groups:
            if group.index not in self._room or not self._residents[group.index].place.here:
                if self._reader is None:
                    self._reader = ThreadPoolExecutor(1, "hubpath-reader")
                self._let_in(group.index, [*active, group.index])
                self._reading[group.index] = self._reader.submit(self._fetch, group.index)
                return

    def _fetch(self, index: int) -> None:
        place = self._residents[index].place
        with self._naming(index):
            place.fetch()
        self.counters.bytes_in += place.nbytes

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """What is wrong within with a file is wrong with an expert."""
        try:
            yield
        except OSError as error:
            name = expert_name(self._of, index)
            reason = f"{name} cannot be read in: {error.strerror}"
            raise OSError(error.errno, reason, error.filename) from error

    def _wait(self, index: int, named: bool = False) -> None:
        """Until it is read in, if it is being read. named: an error is of this expert's use."""
        future = self._reading.pop(index, None)
        if future is not None and (error := future.exception()) is not None:
            self._room.leave(index)
            if named:
                raise error

    def _in_backward(self, active: Sequence[int], this: Pass, gradient: Tensor) -> None:
        """Their backward pass begins: on a CPU memory comes as it is touched, others leave for it;
        on a device what it needs has stayed."""
        this.ended = True
        for index in active if self._transfers is None else ():
            if self._residents.get(index) is not None and self._residents[index].touched_again:
                self._let_in(index, active)

    def _note(self, inner: Executor) -> None:
        whole = self._whole_room()
        self.counters.room = whole
        if self._transfers is not None:
            self.counters.seconds_copying = self._transfers.seconds_copying
            self.counters.seconds_running = self._transfers.seconds_running
        self.counters.notes = (f"around {inner.name}", *inner.counters.notes)
