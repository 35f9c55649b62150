"""What runs a model: batches on its device, in micro-batches; its precision, and its mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

MIN_PRODUCTS_FOR_THREADS = 10**8  # multiplications of a call: 2 ms of a core


def read_device(name: str) -> torch.device:
    """The device that is meant, which may be another machine's; ValueError if none is."""
    try:
        return torch.device(name)
    except RuntimeError:  # with all that torch knows
        raise ValueError(f"device: expected cpu, cuda, cuda:0, ..., got {name!r}") from None


def check_device(name: str) -> torch.device:
    """The device, if torch sees it; else ValueError."""
    device, count = read_device(name), 0
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if present is not None and present.type == device.type:
        count = torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= count:
        kind = device.type
        seen = ", ".join(f"{kind}:{i}" for i in range(count)) or f"no {kind.upper()} device"
        raise ValueError(f"device: torch sees {seen}, got {name!r}; use one that is there, or cpu")
    return device


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The precision context of ``TrainerConfig.amp``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within, products and convolutions of float32 keep all its bits; then flags are as before.

    A GPU's convolutions are in TF32 unless they are told not to: ten bits of mantissa, and fifty
    layers of it are 1e-2 from float64, where a check allows 2e-3. Flags are set by their older
    names: torch refuses to tell one that was set by both, and so what a user has set by the newer
    names, of single kinds of operations, stays.
    """
    before = []
    for owner in (torch.backends.cudnn, torch.backends.cuda.matmul):
        with contextlib.suppress(RuntimeError):
            before.append((owner, owner.allow_tf32))
    for owner, _ in before:
        owner.allow_tf32 = False
    try:
        yield
    finally:
        for owner, value in before:
            owner.allow_tf32 = value


@contextlib.contextmanager
def threads_for(products: int) -> Iterator[None]:
    """One of torch's threads within, on the CPU, where single calls are small: of fewer
    multiplications than ``MIN_PRODUCTS_FOR_THREADS``. They take a millisecond or two, and where a
    second thread has no core to itself each of them waits for it as long again, many times over."""
    before = torch.get_num_threads()
    try:
        if products < MIN_PRODUCTS_FOR_THREADS:
            torch.set_num_threads(1)
        yield
    finally:
        if before != torch.get_num_threads():
            torch.set_num_threads(before)


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Within, this thread's arithmetic on the CPU takes denormal floats for zero, where the
    processor can; then it does as before. They are tens of times slower."""
    before = bool(torch.tensor(1e-40) * 1 == 0)  # torch does not tell
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; after it each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def to_meta(modules: Iterable[nn.Module]) -> None:
    """Moves modules to the meta device, in place, which frees their memory.

    What is one tensor, or one tensor's memory, stays one, within a module and between these:
    ``Module.to("meta")`` would part them, and names would differ from those of the other ranks.
    """
    moved: dict[int, Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    left: list[Tensor] = []  # as long as they live, no other tensor has their number or memory
    for module in [inner for outer in modules for inner in outer.modules()]:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and not tensor.is_meta:
                    left.append(tensor)
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _on_meta(tensor, storages)
                    held[name] = moved[id(tensor)]


def _on_meta(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """storages: on the meta device, by the address of the memory that they stand for."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in storages or not storage.data_ptr():
        empty = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
        storages[storage.data_ptr()] = empty.untyped_storage()
    found = torch.empty(0, dtype=tensor.dtype, device="meta")
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    found.set_(storages[storage.data_ptr()], *place)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(found, requires_grad=tensor.requires_grad)
    return found


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or the tensors in tuples, lists and dicts, not waiting for the copy."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def samples_of(value: Any, start: int, stop: int) -> Any:
    """The samples start..stop - 1, of a tensor or of tensors in tuples, lists and dicts."""
    return tree_map(lambda tensor: tensor[start:stop], value)
