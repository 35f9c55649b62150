"""A model that a source knows: all that is known of it before it is built or fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .checkpoint import read_state_dict
from .dense import about_images
from .errors import HubError
from .expert import Expert, Layout, load_body
from .outputs import output_refusal
from .weights import WeightSource

# Sides, in pixels, that a refusal offers instead: those that networks are commonly trained at.
COMMON_SIZES = (32, 48, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)

# (state dict, what it was read from) -> the same under the network's present names
Convert = Callable[[Mapping[str, Tensor], str], Mapping[str, Tensor]]


class HeadTask(Protocol):
    """What the hub asks of a task, any ``training.Task``; hashable, as a frozen dataclass is."""

    num_outputs: int

    def expected_shape(self, size: int) -> tuple[int, ...]:
        """Of the outputs for one image of ``size`` pixels a side, without the batch."""

    def attach_head(self, network: nn.Module) -> nn.Module | None:
        """Replaces a network's head once its weights are loaded; ``mark_head`` of model/heads.py
        notes which layers are the head.

        Returns the network to use, such as a ``DenseNetwork`` around the one given; None: the one
        given, changed in place or as it was. Raises HubError for one that cannot have the head."""


@dataclass(frozen=True)
class PlainTask:
    """The head that a network's own library gives it: ``num_outputs`` numbers an image."""

    num_outputs: int

    def expected_shape(self, size: int) -> tuple[int, ...]:
        return (self.num_outputs,)

    def attach_head(self, network: nn.Module) -> None:
        """Nothing: ``HubModel.make`` made it."""


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
    entry: str | None = field(compare=False, default=None)
    config: str = field(default="", repr=False)

    def read(self, path: str | Path) -> Mapping[str, Tensor]:
        """The tensors of a file of weights, its head's among them, named as ``layout`` says;
        HubError where they cannot be read."""
        state = read_state_dict(path, self.entry)
        return state if self.convert is None else self.convert(state, str(path))

    def load(self, expert: Expert, path: str | Path) -> None:
        """Reads a file of weights into an expert's body; HubError unless every tensor fits."""
        load_body(expert, self.read(path), str(path), self.layout)


@lru_cache(maxsize=16)  # a hub often holds an architecture more than once
def skeleton(model: HubModel, task: HeadTask) -> nn.Module:
    """The shapes of the network with the task's head, without weights: on torch's meta device."""

    def make() -> nn.Module:
        return with_head(model.make(task.num_outputs), task)

    try:
        return on_meta(make).eval()
    except HubError as error:  # of attach_head
        raise HubError(*(f"{model.name}: {problem}" for problem in error.problems)) from error
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise HubError(f"{model.name} cannot be built: {error}") from error


def with_head(network: nn.Module, task: HeadTask) -> nn.Module:
    """The network to use once the task has attached its head."""
    attached = task.attach_head(network)
    return network if attached is None else attached


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Builds a network on torch's meta device: shapes without numbers, at no cost.

    The few that compute with tensors as they are built (RegNet) are built in full first.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make()
        except NotImplementedError:
            return make().to("meta")


@lru_cache(maxsize=256)  # a process that builds its hub again knows already
def refusal(
    model: HubModel, task: HeadTask, size: int, image_size: int | None = None
) -> str | None:
    """Why the model with the task's head does not map images [n, 3, size, size] to the outputs
    that the task expects; None: it does.

    image_size: pixels a side of the images that were resized to ``size`` for it; None: none were.
    The model is run on the meta device, which computes shapes only: no weights, no pixels, a tenth
    of a second.
    """
    return outputs_refusal(skeleton(model, task), task, size, image_size)


@lru_cache(maxsize=256)
def training_refusal(
    model: HubModel, task: HeadTask, size: int, image_size: int | None = None
) -> str | None:
    """``refusal`` of the network in training mode, in which some give more outputs."""
    return outputs_refusal(skeleton(model, task), task, size, image_size, training=True)


def outputs_refusal(
    network: nn.Module, task: HeadTask, size: int, image_size: int | None, training: bool = False
) -> str | None:
    """``refusal`` of a network that has its head."""
    expected = task.expected_shape(image_size or size)
    return output_refusal(about_images(network, image_size), expected, size, training)


def accepted_sizes(model: HubModel, task: HeadTask) -> list[int]:
    """The common sides in pixels, and the native one, that the model takes, in ascending order."""
    sizes = sorted({*COMMON_SIZES, model.native_size})
    return [size for size in sizes if refusal(model, task, size) is None]


def wrong_size(model: HubModel, task: HeadTask, size: int, reason: str) -> HubError:
    """Says which sizes the model takes instead."""
    sizes = accepted_sizes(model, task)
    allowed = f"it takes, for example, {', '.join(map(str, sizes))}" if sizes else "no size fits"
    return HubError(f"{model.name} refuses images of {size} x {size} ({reason}); {allowed}")
