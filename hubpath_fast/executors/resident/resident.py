"""One expert and where it rests, and what several share and so stays."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ... import functional as HF
from ...resting import Place, SavedFile, own_tensors
from ..structure import Structure
from .on_device import DevicePlace
from .transfers import Transfers


class Pass:
    """A forward pass whose backward pass is to come, as long as its graph keeps this."""

    ended = False


class Resident:
    """One expert, and where it rests. trained_nbytes: of its trained parameters."""

    def __init__(
        self,
        expert: nn.Module,
        shared: set[int],
        files: Sequence[SavedFile],
        transfers: Transfers | None,
    ):
        tensors = [t for t in own_tensors(expert) if id(t) not in shared]
        self.place: Place | DevicePlace = (
            Place(tensors, files) if transfers is None else DevicePlace(tensors, transfers, files)
        )
        self.keeps = False
        self._passes: list[weakref.ref[Pass]] = []
        self._structure = Structure(expert.modules())
        self._buffers = [t for t in self.place.tensors if not isinstance(t, nn.Parameter)]
        self._trained: list[Tensor] = []
        self._draws: dict[bool, bool] = {}
        self.look()

    def intact(self) -> bool:
        return self._structure.unchanged() and self.place.intact()

    def get_ready(self, expert: nn.Module) -> None:
        """For what will write to it in a step."""
        if torch.is_grad_enabled():
            self.place.make_writable(self._trained)
        if expert.training:
            self.place.make_writable(self._buffers)

    def has_gradients(self) -> bool:
        """Whether it has some, or is to get some on a device."""
        self._passes = [ref for ref in self._passes if (p := ref()) is not None and not p.ended]
        return bool(self._passes) or any(t.grad is not None for t in self._trained)

    def expect_gradients(self, of: Pass) -> None:
        self._passes.append(weakref.ref(of))

    @property
    def held_nbytes(self) -> int:
        """What a step keeps until its update, and the next one's beginning."""
        kept = self.place.nbytes - self.trained_nbytes if self.keeps else 0
        return 2 * self.trained_nbytes + self._state_nbytes + kept

    @property
    def size_while_held(self) -> int:
        """What it takes besides, which leaves when others come."""
        return 0 if self.keeps else self.place.nbytes - self.trained_nbytes

    def footprint(self, training: bool) -> int:
        """All that it may take."""
        if not training:
            return self.place.nbytes
        return self.place.nbytes + self.trained_nbytes + self._state_nbytes

    @property
    def _state_nbytes(self) -> int:
        """With what the first update makes."""
        return max(self.place.state_nbytes, self.place.copies * self.trained_nbytes)

    @property
    def touched_again(self) -> bool:
        """Whether its backward pass goes through most of it: it begins at the end and reaches the
        first that is trained."""
        parameters = [t for t in self.place.tensors if isinstance(t, nn.Parameter)]
        first = next((i for i, p in enumerate(parameters) if p.requires_grad), len(parameters))
        return 2 * sum(p.nbytes for p in parameters[first:]) > self.place.nbytes

    def draws(self, training: bool) -> bool | None:
        """Whether it draws random numbers in that mode; None: not known yet."""
        return self._draws.get(training)

    def drew(self, training: bool, drew: bool) -> None:
        self._draws[training] = self._draws.get(training, False) or drew

    def look(self) -> None:
        """Looks what is trained: parameters are frozen and thawed at any time."""
        self._trained = [t for t in self.place.tensors if t.requires_grad]
        self.trained_nbytes = sum(t.nbytes for t in self._trained)


def shared_tensors(experts: Sequence[nn.Module]) -> set[int]:
    """Identities of tensors that several experts hold, or that share memory with another tensor:
    those stay in memory."""
    held: dict[int, tuple[Tensor, set[int]]] = {}
    for index, expert in enumerate(experts):
        for tensor in own_tensors(expert):
            held.setdefault(id(tensor), (tensor, set()))[1].add(index)
    shared = {key for key, (_, by) in held.items() if len(by) > 1}
    tensors = [t for t, _ in held.values() if t.numel() and not t.is_meta]
    end, last = 0, None
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        if tensor.data_ptr() < end:
            shared |= {id(tensor), id(last)}
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if (stop := tensor.data_ptr() + span * tensor.element_size()) > end:
            end, last = stop, tensor
    return shared


def on_host(move: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What a move makes of a tensor of the host, brought back if that is on a device; the tensor
    itself where nothing but the device would be another."""
    like = torch.empty((2,) * tensor.dim(), dtype=tensor.dtype)
    like = like.contiguous(memory_format=HF.own_memory_format(tensor))
    moved = move(like)
    if moved.device.type == "cpu":
        return move(tensor)
    if moved.dtype == like.dtype and moved.stride() == like.stride():
        return tensor
    return move(tensor).cpu()
