"""What a model costs, computed on torch's meta device, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..model import FeatureGenerator, HubPathway, PathwayGenerator
from .dense import about_images
from .expert import Expert
from .outputs import run_once
from .source import HeadTask, HubModel, PlainTask, refusal, skeleton, wrong_size

TASK = PlainTask(100)  # of the head with which costs are counted; a head is a small part
# That a device does in the time of moving a byte, roughly, on CPUs and GPUs alike. Networks of many
# small layers wait for their activations: by FLOPs alone their share of a step is underrated.
FLOPS_PER_BYTE = 60
BYTES_PER_ADAMW_PARAMETER = 16  # float32 weight, gradient and two moments


@dataclass(frozen=True)
class Costs:
    """What an expert costs at ``size`` pixels a side, float32.

    parameters: of the network with a head for 100 classes. flops: floating-point operations of one
    image's forward pass; a multiplication and an addition count as two; None where torch cannot
    count them. state_bytes: weights, gradients and AdamW's two moments. activation_bytes: what
    backward needs of one image.
    """

    size: int
    parameters: int
    flops: int | None
    state_bytes: int
    activation_bytes: int

    @property
    def work(self) -> int:
        """What a row costs in a training step, beside other experts': FLOPs, and bytes of
        activations in FLOPs. FLOPs that are not known are those of using each parameter once."""
        flops = 2 * self.parameters if self.flops is None else self.flops
        return flops + FLOPS_PER_BYTE * self.activation_bytes

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
        flops=module_flops(network, size),
        state_bytes=BYTES_PER_ADAMW_PARAMETER * parameters,
        activation_bytes=saved_bytes(network, size),
    )


def count_flops(network: nn.Module, size: int) -> int:
    """FLOPs of one image's forward pass in evaluation mode, as far as torch counts operations; on
    the meta device, wherever the network can be run there, they cost nothing."""
    _, counter = run_once(network, 1, size, watch=_counting)
    return counter.get_total_flops()


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    # Without autograd torch's counter fails at a module that is given a parameter, such as the
    # query of an attention pooling.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        yield counter


def module_flops(module: nn.Module, size: int) -> int | None:
    """``count_flops`` of any module; None where it cannot be run on one grey image."""
    try:
        return count_flops(module, size)
    except Exception:  # each module has its own way to refuse
        return None


def expert_flops(expert: Expert, num_outputs: int, size: int) -> int | None:
    """``module_flops`` of an expert for images of that size; those of a named one are kept."""
    if expert.model is None:
        return module_flops(expert.module, size)
    return _flops_of(expert.model, expert.task or PlainTask(num_outputs), expert.size, size)


@lru_cache(maxsize=256)
def _flops_of(model: HubModel, task: HeadTask, size: int, image_size: int) -> int | None:
    return module_flops(about_images(skeleton(model, task), image_size), size)


def router_share(model: HubPathway, size: int) -> float | None:
    """FLOPs of the router for one image of ``size`` pixels a side over those of K mean experts;
    None where they cannot be counted."""
    router, *experts = (module_flops(part, size) for part in (model.generator, *model.experts))
    if router is None or None in experts or not any(experts):
        return None
    return router / (model.k * sum(experts) / len(experts))


def router_text(model: HubPathway, size: int) -> str:
    """What the router of a model is, and its share, for people."""
    share, generator = router_share(model, size), model.generator
    kind = type(generator).__name__
    if isinstance(generator, PathwayGenerator):
        kind = generator_text(generator.width, generator.stride, size)
    elif isinstance(generator, FeatureGenerator):
        of = "a network of its own" if generator.own else "an expert, which runs on every image"
        kind = f"linear heads on the features of {generator.source.name}, {of}"
    return kind + ("" if share is None else f", {100 * share:.1f} % of K mean experts' FLOPs")


def generator_text(width: int, stride: int, size: int) -> str:
    """A ``PathwayGenerator`` on images of ``size`` pixels a side, for people."""
    pooled = f" (stride {stride})" if stride > 1 else ""
    return f"nine layers, width {width}, on {size // stride} px{pooled}"


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
