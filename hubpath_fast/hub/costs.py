"""What a model costs, computed on torch's meta device, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .source import HubModel, PlainTask, refusal, skeleton, wrong_size

TASK = PlainTask(100)  # of the head with which costs are counted; a head is a small part
BYTES_PER_ADAMW_PARAMETER = 16  # float32 weight, gradient and two moments


@dataclass(frozen=True)
class Costs:
    """What an expert costs at ``size`` pixels a side, float32.

    parameters: of the network with a head for 100 classes. flops: floating-point operations of one
    image's forward pass; a multiplication and an addition count as two. state_bytes: weights,
    gradients and AdamW's two moments. activation_bytes: what backward needs of one image.
    """

    size: int
    parameters: int
    flops: int
    state_bytes: int
    activation_bytes: int

    def training_bytes(self, batch_size: int) -> int:
        """Memory of a training step on that many rows, by estimate: working space of the libraries
        and fragmentation come on top."""
        return self.state_bytes + batch_size * self.activation_bytes


def costs(model: HubModel, size: int) -> Costs:
    """Counts a model's costs at ``size`` pixels; HubError if it refuses such images."""
    reason = refusal(model, TASK, size)
    if reason is not None:
        raise wrong_size(model, TASK, size, reason)
    network = skeleton(model, TASK)
    parameters = sum(p.numel() for p in network.parameters())
    return Costs(
        size=size,
        parameters=parameters,
        flops=count_flops(network, size),
        state_bytes=BYTES_PER_ADAMW_PARAMETER * parameters,
        activation_bytes=saved_bytes(network, size),
    )


@torch.no_grad()
def count_flops(network: nn.Module, size: int) -> int:
    """FLOPs of one image's forward pass through a network, where it is; on the meta device they
    cost nothing."""
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops()


def saved_bytes(network: nn.Module, size: int) -> int:
    """Bytes that autograd keeps for the backward pass of one image, parameters aside.

    The network, on the meta device, is run on two images, since BatchNorm in training refuses a
    single value a channel.
    """
    own = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own and id(tensor) not in own:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # one storage, however many layers keep it
        return tensor

    network.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(torch.empty(2, 3, size, size, device="meta"))
    finally:
        network.eval()
    return sum(storage.nbytes() for storage in kept.values()) // 2
