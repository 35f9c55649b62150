"""What captures and replays: CUDA, behind the few calls that captured experts need of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from .lanes import Lanes


class Backend(Protocol):
    """What captures: ``CudaBackend``, or a stand-in that tests run without a GPU."""

    num_lanes: int

    def forked(self, lanes: Iterable[int], reads: Tensor) -> AbstractContextManager: ...

    def lane(self, index: int) -> AbstractContextManager: ...

    def new_pool(self) -> object: ...

    def warm_up(self, function: Callable[[], object]) -> None:
        """Runs it a few times on the current lane; raises if it waits for the device."""

    def capture(self, function: Callable[[], list], pool: object) -> Callable[[], None]:
        """Records ``function`` on the current lane and returns its replay, which leaves the results
        in the tensors that the function returned."""

    def memory(self) -> int:
        """Bytes held on the device, by which a capture's cost is told."""

    def budget(self) -> int:
        """Bytes that graphs may hold together."""

    def random_state(self) -> Tensor: ...

    def set_random_state(self, state: Tensor) -> None: ...


class CudaBackend:
    """Captures on the lane that later replays: kernels of one lane share its workspaces, those of
    two run at once."""

    WARM_UPS = 3  # libraries choose algorithms and allocate workspaces in their first runs
    SHARE = 0.3  # of the device's memory
    num_lanes = 8

    def __init__(self, device: torch.device):
        self.device = device
        lanes = Lanes(device, self.num_lanes)
        self.forked, self.lane = lanes.forked, lanes.lane

    def new_pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], object]) -> None:
        for _ in range(self.WARM_UPS - 1):
            function()
        # What waits for the device cannot be captured. It is found here, since a capture that it
        # breaks off leaves torch's random generator unusable for the rest of the process.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, function: Callable[[], list], pool: object) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (one that pins batches) may call CUDA meanwhile without spoiling this.
        with torch.cuda.graph(
            graph,
            pool=pool,
            stream=torch.cuda.current_stream(self.device),
            capture_error_mode="thread_local",
        ):
            function()
        return graph.replay

    def memory(self) -> int:
        torch.cuda.empty_cache()  # as a capture does: what was freed before is not its cost
        return torch.cuda.memory_reserved(self.device)

    def budget(self) -> int:
        return int(self.SHARE * torch.cuda.get_device_properties(self.device).total_memory)

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)
