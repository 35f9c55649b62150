"""A model that a source knows: all that can be said of it before it is built or fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from .errors import HubError
from .expert import Expert, Layout, load_body
from .weights import WeightSource, read_state_dict

# Sides, in pixels, that a refusal offers instead: those that networks are commonly trained at.
COMMON_SIZES = (32, 48, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)

# (state dict, what it was read from) -> the same under the network's present names
Convert = Callable[[Mapping[str, Tensor], str], Mapping[str, Tensor]]


@dataclass(frozen=True)
class HubModel:
    """A model by name.

    name: in full, with source and tag, such as "timm/resnet50.a1_in1k". native_size: pixels a side
    that it was pre-trained at. fixed_size: its source says that it was built for that size alone.
    mean, std: of its images, in units of images in [0, 1]. interpolation: how its images were
    resized. make: number of outputs C -> the network, random weights. weights: where they are;
    None: nowhere. layout, convert: how a file of weights names them.

    Two of one name are equal.
    """

    name: str
    native_size: int = field(compare=False)
    fixed_size: bool = field(compare=False)
    mean: tuple[float, ...] = field(compare=False)
    std: tuple[float, ...] = field(compare=False)
    interpolation: str = field(compare=False)
    make: Callable[[int], nn.Module] = field(compare=False, repr=False)
    weights: WeightSource | None = field(compare=False)
    layout: Layout = field(compare=False, default_factory=Layout)
    convert: Convert | None = field(compare=False, default=None)

    def load(self, expert: Expert, path) -> None:
        """Reads a file of weights into an expert's body; HubError unless every tensor fits."""
        state = read_state_dict(path)
        if self.convert is not None:
            state = self.convert(state, str(path))
        load_body(expert, state, str(path), self.layout)


@lru_cache(maxsize=16)  # a hub often holds an architecture more than once
def skeleton(model: HubModel, num_outputs: int) -> nn.Module:
    """The network's shapes, without weights: on torch's meta device."""
    try:
        return on_meta(lambda: model.make(num_outputs)).eval()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise HubError([f"{model.name} cannot be built: {error}"]) from error


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Builds a network on torch's meta device: shapes without numbers, at no cost.

    The few that compute with tensors as they are built (RegNet) are built in full first.
    """
    try:
        with torch.device("meta"):
            return make()
    except NotImplementedError:
        with torch.random.fork_rng(devices=[]):
            return make().to("meta")


def refusal(model: HubModel, num_outputs: int, size: int) -> str | None:
    """Why the model does not map images [n, 3, size, size] to [n, num_outputs]; None: it does.

    The model is run on the meta device, which computes shapes only: no weights, no pixels, a tenth
    of a second.
    """
    return module_refusal(skeleton(model, num_outputs), num_outputs, size)


def accepted_sizes(model: HubModel, num_outputs: int) -> list[int]:
    """The common sides in pixels, and the native one, that the model takes, in ascending order."""
    sizes = sorted({*COMMON_SIZES, model.native_size})
    return [size for size in sizes if refusal(model, num_outputs, size) is None]


@torch.no_grad()
def module_refusal(module: nn.Module, num_outputs: int, size: int) -> str | None:
    """``refusal`` of a module of any device, which stays as it is: its shapes run on meta."""
    named = [*module.named_parameters(), *module.named_buffers()]
    shapes = {name: tensor.to("meta") for name, tensor in named}
    modes = {layer: layer.training for layer in module.modules()}
    images = torch.empty(1, 3, size, size, device="meta")
    try:
        output = torch.func.functional_call(module.eval(), shapes, (images,))
    except Exception as error:  # each architecture has its own way to refuse
        return str(error) or type(error).__name__
    finally:
        for layer, training in modes.items():
            layer.training = training
    if not isinstance(output, Tensor) or output.shape != (1, num_outputs):
        return f"it has no classifier that gives {num_outputs} outputs an image"
    return None
