"""What a step costs besides time: waits of the host, launches, expert forwards, operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class DeviceTime:
    """What a GPU does in one call. busy: seconds in which it runs anything at all; added: seconds
    of all that it runs, more where kernels overlap. launches: asked for by the host, a captured
    graph being one. dearest: (name, seconds, times) of the five kernels that take longest."""

    busy: float
    added: float
    launches: float
    dearest: tuple[tuple[str, float, float], ...]


def device_time(function: Callable[[], object], device: str, calls: int = 1) -> DeviceTime | None:
    """The means of so many calls, by torch's profiler; None off the GPU, and where the profiler saw
    nothing of it (another tool may hold its counters): that is no idle device.

    Where the profiler names no calls of the runtime, the kernels themselves are the launches.
    """
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    events = profile.events()
    ran = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    if not ran:
        return None
    asked = sum(e.name.startswith(LAUNCHES) for e in events)
    kernels = sum(not e.name.startswith(("Memcpy", "Memset")) for e in ran)
    spans = sorted((e.time_range.start, e.time_range.end) for e in ran)
    times: dict[str, list[float]] = {}
    for e in ran:
        times.setdefault(e.name, []).append(e.time_range.end - e.time_range.start)
    dearest = sorted(times.items(), key=lambda item: -sum(item[1]))[:5]
    unit = 1e-6 / calls  # the profiler's microseconds
    return DeviceTime(
        covered(spans) * unit,
        sum(map(sum, times.values())) * unit,
        (asked or kernels) / calls,
        tuple((name[:120], sum(spent) * unit, len(spent) / calls) for name, spent in dearest),
    )


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of what sorted (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def launches(function: Callable[[], object], device: str) -> int | None:
    """Launches of one call on a GPU; None elsewhere, and where the profiler saw none."""
    found = device_time(function, device)
    return None if found is None else round(found.launches)


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
