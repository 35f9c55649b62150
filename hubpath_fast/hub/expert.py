"""One expert of a hub: its network with a new head, and what its images must look like.

Shapes: n images of a batch, C outputs of the target task, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import HubError

NAMES_IN_MESSAGE = 8


class Resized(nn.Module):
    """A network that wants images of one size, for images of any size: resizes, then calls it.

    body: the network. size: S, pixels a side that it wants. interpolation: "bilinear" or "bicubic",
    antialiased as timm and torchvision do it; anything else counts as bicubic.
    """

    def __init__(self, body: nn.Module, size: int, interpolation: str = "bilinear"):
        super().__init__()
        self.body, self.size = body, size
        self.interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 3, H, W], already normalised -> [n, C]."""
        if x.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            x = F.interpolate(x, size, mode=self.interpolation, antialias=True)
        return self.body(x)

    def extra_repr(self) -> str:
        return f"size={self.size}, interpolation={self.interpolation}"


@dataclass(eq=False)
class Expert:
    """A pre-trained network with a head for the target task.

    name: "timm/resnet50.a1_in1k". module: normalised images [n, 3, S, S] -> [n, C], S the hub's
    input size. mean, std: what the network's images were normalised with, a value a channel, in
    units of images in [0, 1]. native_size: the side it was pre-trained at. size: the side it works
    at; where that is not the hub's input size, ``module`` is a ``Resized``. fixed_size: timm says
    that it was built for the native size alone (a few of those take others still).
    """

    name: str
    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    native_size: int
    size: int
    fixed_size: bool

    @property
    def body(self) -> nn.Module:
        """The network itself, without the resizing around it."""
        return network(self.module)


def network(module: nn.Module) -> nn.Module:
    """The network inside an expert's module."""
    return module.body if isinstance(module, Resized) else module


def head_names(module: nn.Module) -> set[str]:
    """Names, within ``network(module)``, of the parameters and buffers of its classifier.

    The classifier is what timm's ``get_classifier()`` says, which may be several layers. A network
    without that method has no head that we know of: the set is empty.
    """
    body = network(module)
    if not hasattr(body, "get_classifier"):
        return set()
    heads = body.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    layers = {id(layer) for head in heads if head is not None for layer in head.modules()}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in body.named_modules()
        if id(layer) in layers
        for name in [*layer._parameters, *layer._buffers]
    }


def head_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of an expert's new head; see ``head_names``."""
    return split_parameters(module)[1]


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """An expert's parameters as (body, head), for learning rates of their own; none is in both."""
    heads = head_names(module)
    body, head = [], []
    for name, parameter in network(module).named_parameters():
        (head if name in heads else body).append(parameter)
    return body, head


def load_body(
    expert: Expert | nn.Module, state_dict: Mapping[str, Tensor], source: str = ""
) -> None:
    """Copies pre-trained weights into an expert, all but its head.

    expert: an ``Expert`` or its module. state_dict: of the same architecture, with a head of any
    number of outputs or none; the head's tensors are not read. source: where it comes from, for the
    messages.

    Raises HubError, and leaves the expert as it was, if a tensor of the body is missing, is left
    over or has another shape: a body that is half loaded would train, badly, without a word.
    """
    module = expert.module if isinstance(expert, Expert) else expert
    body, heads = network(module), head_names(module)
    own = {name: tensor for name, tensor in body.state_dict().items() if name not in heads}
    given = {name: tensor for name, tensor in state_dict.items() if name not in heads}
    shapes = [
        f"{name} ({list(given[name].shape)} instead of {list(own[name].shape)})"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    parts = [
        f"{len(names)} {what}: {_some(sorted(names))}"
        for what, names in (
            ("missing", own.keys() - given.keys()),
            ("left over", given.keys() - own.keys()),
            ("of another shape", shapes),
        )
        if names
    ]
    if parts:
        name = expert.name if isinstance(expert, Expert) else type(body).__name__
        where = f" of {source}" if source else ""
        raise HubError(
            [f"the weights{where} do not fit {name} (heads aside): tensors " + "; ".join(parts)]
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_IN_MESSAGE])
    rest = len(names) - NAMES_IN_MESSAGE
    return shown if rest <= 0 else f"{shown} and {rest} more"
