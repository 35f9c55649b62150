"""How many bytes an implementation moves: what each operator reads and writes, added up; and how
many it allocates at its worst.

Every operator that computes counts its tensor arguments once as read and its results once as
written, at most the memory behind them (an expanded tensor is read as the vector it is). Views
count nothing. It is the traffic of a machine whose caches keep nothing from one launch to the
next. What one fused kernel reads twice counts once, so it is a lower bound for it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Bytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not _is_free(func):
            written = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
            given = tree_leaves((args, kwargs))
            known = {id(tensor) for tensor in written}  # in-place: counted as written
            read = [leaf for leaf in given if isinstance(leaf, Tensor) and id(leaf) not in known]
            self.total += sum(map(_size, written)) + sum(map(_size, read))
        return results


def _is_free(func) -> bool:
    name = func.overloadpacket.__name__
    return func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))


def _size(tensor: Tensor) -> int:
    own = tensor.numel() * tensor.element_size()
    return own if tensor.is_sparse else min(own, tensor.untyped_storage().nbytes())


def moved_bytes(function: Callable[[], object]) -> int:
    """Bytes read and written by all operators of one call."""
    with _Bytes() as counter:
        function()
    return counter.total


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Bytes that one call allocates beyond what was there, at its worst; None off the GPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def allocated_peak(function: Callable[[], object]) -> int:
    """Bytes that one call allocates on the CPU beyond what was there, at its worst.

    Exact, and the same each time: the profiler lists whatever torch's allocator gives and takes
    back, that of operators and of backward too. What libraries below torch take for themselves
    (packed blocks of a matrix product, some MB) is not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it reports its start and stop each time
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = function()
        del result
        profiler.export_chrome_trace(str(path))
        found = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    at, peak = 0, 0
    for event in sorted(found, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        at += event["args"]["Bytes"]
        peak = max(peak, at)
    return peak
