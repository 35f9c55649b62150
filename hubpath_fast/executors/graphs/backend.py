"""What captures and replays: CUDA, behind the few calls that captured experts need of it."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..stream_pool import StreamPool

# Up to 2.11 the allocator of pinned memory goes on to ask a graph whose capture failed whether it
# is capturing, and nothing can tell it to stop: such graphs are never freed.
_FAILED: list[torch.cuda.CUDAGraph] = []


class BrokenCaptureError(RuntimeError):
    """A capture failed, and what it left behind could not be cleaned up: nothing may go on."""


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


class CudaBackend:
    """Captures on the stream that later replays: kernels of one stream share its workspaces, those
    of two are concurrent. Tests run a stand-in with the same methods, without a GPU.

    num_streams: that experts are spread over. one_random_state: whether all graphs share one random
    state on the device. forked, on: see ``StreamPool``.
    """

    WARM_UPS = 3  # libraries choose algorithms and allocate workspaces in their first runs
    MEMORY_FRACTION = 0.3  # of the device's memory, for graphs

    def __init__(self, device: torch.device, num_streams: int = 8):
        self.device, self.num_streams = device, num_streams
        pool = StreamPool(device, num_streams)
        self.forked, self.on = pool.forked, pool.on
        # Until 2.11 every replay writes to the one state of the generator, drawing or not. Seen in
        # the headers of 2.11 and 2.14; of the versions between we take the worse.
        self.one_random_state = _torch_version() < (2, 14)

    def new_pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within, nothing is collected: a graph or a kernel's module that dies during a capture
        would end it."""
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()

    def warm_up(self, function: Callable[[], object]) -> None:
        """Runs it a few times on the current stream; raises if it waits for the device."""
        for _ in range(self.WARM_UPS - 1):
            function()
        # What waits for the device cannot be captured. It is found here, where an exception leaves
        # nothing to clean up.
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        # Once for all captures that follow: during one, cached memory is not given back.
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def capture(self, function: Callable[[], list], pool: object) -> Callable[[], None]:
        """Records ``function`` on the current stream and returns its replay, which leaves results
        in the tensors that the function returned. After an exception everything is as before, but
        the pool must not be captured into again."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (one that pins batches) may call CUDA meanwhile without spoiling this.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with contextlib.suppress(Exception):  # of what broke it off, the first says most
                    graph.capture_end()
                raise
            graph.capture_end()
        except BaseException as error:
            self._clean_up(graph, pool, error)
            raise
        return graph.replay

    def _clean_up(self, graph: torch.cuda.CUDAGraph, pool: object, error: BaseException) -> None:
        """After a failed capture: the allocator's and the generator's state as before it.

        Up to 2.11 torch leaves both as if the capture went on: whatever is freed on two streams
        would wait for its end, for ever, and the next random number raise. Later versions end what
        they began themselves, some in ``reset``; then there is nothing left to end here.
        """
        _FAILED.append(graph)
        graph.reset()
        with contextlib.suppress(RuntimeError):  # "not currently recording": nothing to end
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
            # The use of the pool that the capture began. Where torch ended the recording itself
            # it releases the pool, or leaks it: to release it twice would be worse.
            torch._C._cuda_releasePool(self.device.index, pool)
        try:
            # A capture that ends well takes the generator out of its capturing state.
            empty = torch.cuda.CUDAGraph()
            empty.capture_begin(capture_error_mode="thread_local")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is empty
                empty.capture_end()
        except Exception as again:
            raise BrokenCaptureError(
                f"a module could not be captured ({error}), and CUDA's state could not be cleaned "
                f"up after it ({again}); start again from the last checkpoint with "
                'executor="streams" or "sequential"'
            ) from error

    def borrow(self, tensor: Tensor) -> Tensor:
        """The same memory, without keeping it from the pool it belongs to."""
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel() == 0:
            return torch.empty_like(tensor)
        memory = _Memory(tensor.data_ptr(), extent * tensor.element_size())
        flat = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())

    def memory(self, pool: object) -> int:
        """Bytes that a pool holds on the device."""
        segments = torch.cuda.memory_snapshot(pool)
        return sum(segment["total_size"] for segment in segments)

    def budget(self) -> int:
        """Bytes that graphs may hold together."""
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return int(self.MEMORY_FRACTION * memory)

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)


class _Memory:
    """Bytes on a device, as NumPy's interface for other libraries' arrays names them."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }
