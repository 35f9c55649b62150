"""What torch's own ``torch.cuda`` finds in ``torch._C`` where torch was built with CUDA.

``torch.cuda`` itself stays torch's: streams, events, graphs and memory go through its Python code,
as on a device. Installed just before ``torch.cuda`` is imported, after ``torch._C`` was.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import time
import types
import warnings
from pathlib import Path
from typing import Any, ClassVar

NAME = "NVIDIA H100 80GB HBM3 (emulated)"
TOTAL_MEMORY = 80 << 30
CUDA = 1  # the number of torch's device type
_pools = itertools.count(1)
_recording: set[tuple[int, int]] = set()


def install(torch_c: types.ModuleType, library: Path) -> None:
    """Loads the library and fills ``torch._C``."""
    # Where torch was built with CUDA, its kernels are replaced, and it says so.
    warnings.filterwarnings("ignore", message="Warning only once for all operators")
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for name, value in _functions().items():
        setattr(torch_c, name, value)
    torch_c._has_cuda = True
    torch_c._cudart = _runtime()
    torch_c._CudaDeviceProperties = Properties
    torch_c._CudaStreamBase = _stream_base(torch_c.Stream)
    torch_c._CudaEventBase = _event_base(torch_c.Event)
    torch_c._CUDAGraph = Graph
    torch_c._MemPool = type("_MemPool", (), {})
    torch_c._cuda_CUDAAllocator = type("_cuda_CUDAAllocator", (), {})


def ops() -> Any:
    import torch

    return torch.ops.emulated_cuda


class Properties:
    """Of an H100 with 80 GB."""

    name = NAME
    major, minor = 9, 0
    total_memory = TOTAL_MEMORY
    multi_processor_count = 132
    max_threads_per_multi_processor = 2048
    max_threads_per_block = 1024
    warp_size = 32
    regs_per_multiprocessor = 65536
    shared_memory_per_block = 49152
    shared_memory_per_block_optin = 232448
    shared_memory_per_multiprocessor = 233472
    L2_cache_size = 50 << 20
    clock_rate, memory_clock_rate, memory_bus_width = 1_980_000, 2_619_000, 5120
    is_integrated = is_multi_gpu_board = 0
    gcnArchName = ""
    uuid = "00000000-0000-0000-0000-000000000000"
    pci_bus_id = pci_device_id = pci_domain_id = 0


def _stream_base(base: type) -> type:
    class _CudaStreamBase(base):
        def __new__(cls, priority=0, stream_id=None, device_index=0, device_type=CUDA, **rest):
            if rest:
                raise RuntimeError("the emulated device has no streams of others")
            if stream_id is None:
                return super().__new__(cls, device="cuda:0", priority=priority)
            return super().__new__(
                cls, stream_id=stream_id, device_index=device_index, device_type=device_type
            )

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

        @property
        def priority(self) -> int:
            return 0

        def synchronize(self) -> None:
            ops().wait_for_events("stream.synchronize")
            super().synchronize()

    return _CudaStreamBase


def _event_base(base: type) -> type:
    class _CudaEventBase(base):
        def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):
            event = super().__new__(cls, device="cuda:0", enable_timing=True)
            event._is_timed, event._time = enable_timing, None
            return event

        @property
        def cuda_event(self) -> int:
            return self.event_id

        def synchronize(self) -> None:
            ops().count_allowed_wait("event.synchronize")  # torch's sync_debug_mode allows it
            super().synchronize()

        def record(self, stream: Any) -> None:
            super().record(stream)
            self._time = time.perf_counter()

        def elapsed_time(self, other: Any) -> float:
            """The host's time between the two, in milliseconds: work is done as it is given."""
            if not (self._is_timed and other._is_timed):
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            if self._time is None or other._time is None:
                raise ValueError("Both events must be recorded before calculating elapsed time.")
            return 1e3 * (other._time - self._time)

    return _CudaEventBase


class Graph:
    """``torch._C._CUDAGraph``: what torch 2.11 and 2.14 call of it."""

    _launches: ClassVar[dict[int, Any]] = {}  # by number: launches that a capture recorded
    _by_pool: ClassVar[dict[tuple[int, int], set[int]]] = {}

    def __new__(cls, keep_graph: bool = False):
        graph = super().__new__(cls)
        graph._id, graph._pool, graph._numbers = None, None, []
        graph._has_graph_exec = False
        return graph

    def capture_begin(self, pool=None, capture_error_mode="global") -> None:
        self._release()
        self._pool = tuple(pool) if pool is not None else _new_pool()
        _recording.add(self._pool)
        try:
            self._id = ops().begin_capture()
        except BaseException:
            _recording.discard(self._pool)
            raise
        Graph._by_pool.setdefault(self._pool, set()).add(self._id)
        _captured.append(self)

    def capture_end(self) -> None:
        _captured.remove(self)
        _recording.discard(self._pool)
        ops().end_capture(self._id)
        self._has_graph_exec = True

    capture_end_pre = capture_end

    def capture_end_post(self) -> None:
        pass

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        entry = ops().replay(self._id, 0)
        while entry >= 0:
            Graph._launches[ops().launch_of(self._id, entry)]()
            entry = ops().replay(self._id, entry + 1)

    def keep_launch(self, launch: Any) -> int:
        """Has replays call it; its number."""
        number = next(_numbers)
        Graph._launches[number] = launch
        self._numbers.append(number)
        return number

    def pool(self) -> tuple[int, int]:
        return self._pool

    def pools(self) -> list[tuple[int, int]]:
        return [self._pool]

    def enable_debug_mode(self) -> None:
        pass

    def reset(self) -> None:
        self._release()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        if self._id is None:
            return
        if self in _captured:
            _captured.remove(self)
        Graph._by_pool[self._pool].discard(self._id)
        for number in self._numbers:
            del Graph._launches[number]
        self._numbers = []
        ops().drop_graph(self._id)
        self._id, self._has_graph_exec = None, False


_numbers = itertools.count()
_captured: list[Graph] = []  # under way


def capturing() -> Graph | None:
    """The graph that the current stream is captured for."""
    found = ops().capture_of(ops().current_stream())
    return next((graph for graph in _captured if graph._id == found), None)


def _new_pool() -> tuple[int, int]:
    return 0, next(_pools)


def _end_allocating(device: int, pool: tuple[int, int]) -> None:
    if tuple(pool) not in _recording:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    _recording.discard(tuple(pool))


def _statistics(device: int) -> dict[str, Any]:
    current, peak = ops().statistic("allocated"), ops().statistic("peak")
    both = {"current": current, "peak": peak, "allocated": current, "freed": 0}
    kinds = {kind: dict(both) for kind in ("all", "small_pool", "large_pool")}
    names = ("allocated_bytes", "active_bytes", "reserved_bytes", "requested_bytes")
    count = {"current": ops().statistic("allocations"), "peak": 0, "allocated": 0, "freed": 0}
    return {
        **dict.fromkeys(names, kinds),
        "allocation": {kind: dict(count) for kind in kinds},
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def _snapshot(pool: Any = None) -> dict[str, Any]:
    wanted = tuple(pool)[:2] if pool is not None else (0, 0)
    if wanted == (0, 0):
        sizes = [ops().statistic("allocated")]
    else:
        sizes = [ops().graph_bytes(graph) for graph in Graph._by_pool.get(wanted, ())]
    return {"segments": [{"total_size": size, "segment_pool_id": wanted} for size in sizes]}


class Fork:
    """CUDA does not outlive a fork: a process that asked for devices has children that cannot."""

    asked = is_bad = False

    @classmethod
    def ask(cls) -> int:
        """The number of devices."""
        cls.asked = True
        return 1

    @classmethod
    def happened(cls) -> None:
        cls.is_bad |= cls.asked


os.register_at_fork(after_in_child=Fork.happened)


def _initialise() -> None:
    import torch

    Fork.ask()

    ops().initialise()
    torch.cuda.default_generators = (ops().default_generator(),)
    torch.cuda._get_device_properties = lambda device: Properties()
    torch.UntypedStorage.__new__ = _new_storage


def _new_storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    """torch makes a CUDA storage with the allocator of its own build, whatever is registered."""
    import torch

    if device is None or torch.device(device).type != "cuda":
        more = {} if device is None else {"device": device}
        return super(torch.UntypedStorage, cls).__new__(cls, *args, **more, **kwargs)
    nbytes = args[0] if args else kwargs.get("size", 0)
    return torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()


def _set_stream(stream_id: int, device_index: int = 0, device_type: int = CUDA) -> None:
    ops().set_stream(stream_id)


def _synchronize() -> None:
    ops().count_allowed_wait("torch.cuda.synchronize")
    ops().synchronize()


def _device(index: int = 0) -> int:
    if index > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return 0


def _functions() -> dict[str, Any]:
    def is_capturing() -> bool:
        return ops().capture_of(ops().current_stream()) >= 0

    return {
        "_cuda_init": _initialise,
        "_cuda_getDeviceCount": Fork.ask,
        "_cuda_isInBadFork": lambda: Fork.is_bad,
        "_cuda_getArchFlags": lambda: "sm_90",
        "_cuda_getDevice": lambda: 0,
        # A function each, though they do the same: Dynamo has a handler for each by its function.
        "_cuda_setDevice": lambda index: _device(index),
        "_cuda_exchangeDevice": lambda index: _device(index),
        "_cuda_maybeExchangeDevice": lambda index: _device(index),
        "_cuda_canDeviceAccessPeer": lambda a, b: False,
        "_cuda_getCurrentStream": lambda device: (ops().current_stream(), 0, CUDA),
        "_cuda_getDefaultStream": lambda device: (0, 0, CUDA),
        "_cuda_getCurrentRawStream": lambda device: ops().current_stream(),
        "_cuda_setStream": _set_stream,
        "_cuda_synchronize": _synchronize,
        "_cuda_sleep": lambda cycles: None,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_get_sync_debug_mode": lambda: ops().sync_mode(),
        "_cuda_set_sync_debug_mode": lambda mode: ops().set_sync_mode(mode),
        "_cuda_isCurrentStreamCapturing": is_capturing,
        "_graph_pool_handle": _new_pool,
        "_cuda_beginAllocateToPool": lambda device, pool: _recording.add(tuple(pool)),
        "_cuda_beginAllocateCurrentThreadToPool": lambda device, pool: _recording.add(tuple(pool)),
        "_cuda_endAllocateToPool": _end_allocating,
        "_cuda_releasePool": lambda device, pool: None,
        "_cuda_emptyCache": lambda: None,
        "_host_emptyCache": lambda: None,
        "_cuda_memoryStats": _statistics,
        "_cuda_resetPeakMemoryStats": lambda device: ops().reset_peak(),
        "_cuda_resetAccumulatedMemoryStats": lambda device: None,
        "_cuda_memorySnapshot": _snapshot,
        "_cuda_getMemoryFraction": lambda device: 1.0,
        "_cuda_setMemoryFraction": lambda fraction, device: ops().set_limit(
            int(fraction * TOTAL_MEMORY)
        ),
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_cudaHostAllocator": lambda: 0,
        "_cuda_lock_mutex": lambda: None,
        "_cuda_unlock_mutex": lambda: None,
    }


def _runtime() -> types.ModuleType:
    """``torch.cuda.cudart()``: cudaHostRegister and its like, which return error codes."""

    def register(address: int, nbytes: int, flags: int) -> int:
        ops().pin_range(address, nbytes)
        return 0

    def unregister(address: int) -> int:
        ops().pin_range(address, 0)
        return 0

    runtime = types.ModuleType("_cudart")
    runtime.cudaHostRegister, runtime.cudaHostUnregister = register, unregister
    runtime.cudaMemGetInfo = lambda device: (
        ops().statistic("limit") - ops().statistic("allocated"),
        TOTAL_MEMORY,
    )
    runtime.cudaError = types.SimpleNamespace(success=0)
    runtime.cudaGetErrorString = str
    runtime.cudaProfilerStart = runtime.cudaProfilerStop = lambda: 0
    return runtime
