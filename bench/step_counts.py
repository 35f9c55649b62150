"""What a step costs besides time: waits of the host, launches, expert forwards, operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

READS = ("_local_scalar_dense", "nonzero", "masked_select")


class _Reads(TorchDispatchMode):
    """Operators whose result the host has to wait for: values, and sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        self.total += name in READS or by_mask
        return func(*args, **(kwargs or {}))


def host_reads(function: Callable[[], object]) -> int:
    """How often one call reads values back. ``tolist``, which no operator stands for, included."""
    lists, original = 0, Tensor.tolist

    def tolist(tensor):
        nonlocal lists
        lists += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return original(tensor)

    Tensor.tolist = tolist
    try:
        with _Reads() as reads:
            function()
    finally:
        Tensor.tolist = original
    return lists + reads.total


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


def launches(function: Callable[[], object], device: str) -> int | None:
    """Launches of one call on a GPU, a captured graph being one; None elsewhere.

    Where the profiler names no calls of the runtime, the kernels themselves are counted.
    """
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    events = profile.events()
    calls = sum(e.name.startswith(LAUNCHES) for e in events)
    kernels = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return calls or sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)


def work(experts: Sequence[nn.Module], function: Callable[[], object], n: int):
    """(expert forwards per sample, 1e9 floating-point operations per sample) of one call."""
    rows = 0

    def count(module, args):
        nonlocal rows
        rows += len(args[0])

    handles = [expert.register_forward_pre_hook(count) for expert in experts]
    try:
        with FlopCounterMode(display=False) as flops:
            function()
    finally:
        for handle in handles:
            handle.remove()
    return rows / n, flops.get_total_flops() / n / 1e9
