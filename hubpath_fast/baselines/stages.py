"""Where the stages of a convolutional network end, and what its layers give there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from ..devices import eval_mode
from ..hub.dense import DenseNetwork


def stage_layers(body: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The layers at which a network's stages end.

    Of a timm network those of its ``feature_info``. Of others: its children, or those of the only
    child with parameters that makes images, as long as there is only one; from each run of them
    with the same channels and size the last that does not pool, if there are parameters in the run.

    shapes: the output shapes of its layers in the order they run, without those that run several
    times or give something else than a tensor.
    """
    info = getattr(body, "feature_info", None)
    if isinstance(info, list) and info:
        return [entry["module"] for entry in info]
    prefix = body.prefix if isinstance(body, DenseNetwork) else ""  # its head is no stage
    while True:
        children = [
            name
            for name, shape in shapes.items()
            if len(shape) == 4 and name.rpartition(".")[0] == prefix
        ]
        deep = [name for name in children if list(body.get_submodule(name).parameters())]
        if len(deep) != 1 or not list(body.get_submodule(deep[0]).children()):
            break
        prefix = deep[0]
    ends = []
    for _, run in groupby(children, key=shapes.get):
        kinds = {name: type(body.get_submodule(name)).__name__.lower() for name in run}
        layers = [name for name, kind in kinds.items() if "pool" not in kind]
        if any(name in deep for name in layers):
            ends.append(layers[-1])
    if not ends:
        raise ValueError(
            f"layers: found no stages in {type(body).__name__}: none of its layers gives "
            "[n, C, h, w]; Knowledge Flow mixes convolutional networks"
        )
    return ends


def layer_shapes(
    model: nn.Module, body: nn.Module, size: int, channels: int = 3
) -> dict[str, tuple[int, ...]]:
    """What ``stage_layers`` reads of the network ``body`` inside a model, from one grey image of
    ``channels`` channels and ``size`` pixels a side."""
    shapes: dict[str, tuple[int, ...]] = {}
    several: set[str] = set()
    names = [name for name, _ in body.named_modules() if name]

    def note(index: int, _module, _args, output) -> None:
        name = names[index]
        if name in shapes:
            several.add(name)
        shapes[name] = tuple(output.shape) if isinstance(output, Tensor) else ()

    parameter = next(model.parameters())
    like = {"device": parameter.device, "dtype": parameter.dtype}
    image = torch.full((1, channels, size, size), 0.5, **like)
    hooks = hooked(body, names, lambda index: partial(note, index))
    with eval_mode(model), torch.no_grad(), hooks:
        model(image)
    return {name: s for name, s in shapes.items() if s and name not in several}


def channels_of(name: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """The channels of a layer's output; ValueError if that cannot be mixed."""
    if name not in shapes:
        raise ValueError(
            f"layers: {name!r} does not run exactly once with a tensor as output; layers that do: "
            f"{', '.join(n for n, s in shapes.items() if len(s) == 4 and '.' not in n)}, ..."
        )
    shape = shapes[name]
    if len(shape) != 4 or shape[2] != shape[3]:  # square images in: [n, h, w, C] is not square
        raise ValueError(
            f"layers: {name!r} gives {list(shape)} for one square image, not [n, C, h, w]; "
            "Knowledge Flow mixes convolutional networks"
        )
    return shape[1]


def layer_outputs(
    model: nn.Module, body: nn.Module, layers: Sequence[str], images: Tensor
) -> list[Tensor]:
    """The outputs of layers of the network ``body`` inside a model, in their order."""
    outputs: dict[int, Tensor] = {}

    def note(index: int, _module, _args, output: Tensor) -> None:
        outputs[index] = output.clone()  # an activation in place may follow

    with hooked(body, layers, lambda index: partial(note, index)):
        model(images)
    return [outputs[index] for index in range(len(layers))]


@contextmanager
def hooked(body: nn.Module, layers: Sequence[str], hook: Callable) -> Iterator[None]:
    """``hook(index)`` as forward hook of each layer, for as long as the context lasts: a hook that
    stayed would be copied with the network, and would go on writing into the original."""
    handles = [
        body.get_submodule(name).register_forward_hook(hook(i)) for i, name in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
