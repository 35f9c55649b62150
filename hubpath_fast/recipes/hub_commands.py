"""``hubpath hub list`` and ``hubpath hub show``: what can be an expert, and what it costs.

Nothing here uses the network. Costs are computed on torch's meta device, from shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..hub.errors import HubError
from ..hub.names import all_names, closest, list_models
from ..hub.registry import SOURCES
from ..hub.spec import HUBS, ExpertSpec, read_specs

if TYPE_CHECKING:
    from ..hub.source import HubModel

COST_OUTPUTS = 100  # C of the head with which costs are counted; a head is a small part
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


@dataclass(frozen=True)
class Entry:
    """What ``show`` says of one expert: the text it was asked by, its source's facts, its costs.
    cached: the weights' local path where they are there, else None; place: where they belong."""

    spec: str
    name: str
    native_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str | None
    place: str | None
    cached: bool
    costs: Costs


def list_hub(pattern: str | None = None) -> list[str]:
    """The names that match ``pattern``; without one, the named hubs and an overview of the sources.

    Raises HubError, with the closest names, if nothing matches.
    """
    if pattern is None:
        lines = ["named hubs:"]
        lines += [f"  {hub}: {', '.join(names)}" for hub, names in HUBS.items()]
        lines.append("sources:")
        for source in SOURCES:
            prefix = source.partition("/")[0] + "/"
            count = sum(name.startswith(prefix) for name in all_names())
            lines.append(f"  {source}" + (f": {count} names" if count else ": of this machine"))
        lines.append('`hubpath hub list "timm/resnet50*"` lists the names of a pattern')
        return lines
    names = list_models(pattern)
    if not names:
        raise HubError([f"no hub or model matches {pattern!r}; {closest(pattern)}"])
    return names


def show(name: str) -> list[Entry]:
    """One entry for each expert of a name or of a named hub; HubError with all that is unknown."""
    specs = read_specs([name])
    entries, problems = [], []
    for spec in specs:
        try:
            entries.append(_entry(spec))
        except HubError as error:
            problems += error.problems
    if problems:
        raise HubError(list(dict.fromkeys(problems)))
    return entries


def _entry(spec: ExpertSpec) -> Entry:
    from ..hub.registry import find

    model = find(spec)
    weights = model.weights
    path = weights.cached() if weights is not None else None
    return Entry(
        spec=str(spec),
        name=model.name,
        native_size=model.native_size,
        mean=model.mean,
        std=model.std,
        origin=None if weights is None else weights.origin(),
        place=None if weights is None else str(path or weights.place()),
        cached=path is not None,
        costs=costs(model, spec.size or model.native_size),
    )


def costs(model: HubModel, size: int) -> Costs:
    """Counts a model's costs at ``size`` pixels; HubError if it refuses such images."""
    from ..hub.source import accepted_sizes, refusal, skeleton

    reason = refusal(model, COST_OUTPUTS, size)
    if reason is not None:
        sizes = ", ".join(map(str, accepted_sizes(model, COST_OUTPUTS)))
        raise HubError(
            [f"{model.name} refuses images of {size} x {size} ({reason}); takes {sizes}"]
        )
    network = skeleton(model, COST_OUTPUTS)
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
    """FLOPs of one image's forward pass through a network on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # imports much: not for a list

    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, size, size, device="meta"))
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
