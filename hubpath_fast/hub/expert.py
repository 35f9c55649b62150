"""One expert of a hub: its network with a new head, and what its images must look like.

Shapes: n images of a batch, C outputs of the target task, S pixels a side.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..model.heads import head_layers, head_names
from .dense import DenseNetwork
from .errors import HubError

if TYPE_CHECKING:
    from .source import HeadTask, HubModel
    from .spec import ExpertSpec

NAMES_IN_MESSAGE = 8
COUNTER = "num_batches_tracked"  # of BatchNorm: it has learned nothing, and old files lack it


@dataclass(frozen=True)
class Layout:
    """How a source names the tensors of a network.

    prefix: before each of the network's own names. dropped: what the other names begin with, of
    parts that are not wanted, such as a detector's box heads; anything else is left over.
    """

    prefix: str = ""
    dropped: tuple[str, ...] = ()

    def split(self, names) -> tuple[dict[str, str], list[str]]:
        """({the network's name: the file's name}, the file's names that are left over)."""
        kept, left_over = {}, []
        for name in names:
            if name.startswith(self.dropped):
                continue
            if name.startswith(self.prefix):
                kept[name.removeprefix(self.prefix)] = name
            else:
                left_over.append(name)
        return kept, left_over


class Resized(nn.Module):
    """A network that wants images of one size, for images of any size: resizes, then calls it.

    body: the network. size: S, pixels a side that it wants. interpolation: "bilinear" or "bicubic",
    antialiased as timm and torchvision do it; anything else counts as bicubic.
    """

    row_wise = True  # see ``executors.graphs``

    def __init__(self, body: nn.Module, size: int, interpolation: str = "bilinear"):
        super().__init__()
        self.body, self.size = body, size
        self.interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 3, H, W], already normalised -> [n, C]."""
        return self.body(self.resize(x))

    def resize(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, 3, S, S]."""
        size = (self.size, self.size)
        if x.shape[-2:] == size:
            return x
        return F.interpolate(x, size, mode=self.interpolation, antialias=True)

    def extra_repr(self) -> str:
        return f"size={self.size}, interpolation={self.interpolation}"


class RunningStatistics(nn.Module):
    """A network whose BatchNorm layers use, and keep, their running statistics in training too.

    Those of a ``DenseNetwork``'s head do not: the head is new, and has no statistics yet.
    """

    row_wise = True  # see ``executors.graphs``

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        self.train(self.training)

    def train(self, mode: bool = True) -> RunningStatistics:
        super().train(mode)
        body = network(self)
        new = set(body.head.modules()) if isinstance(body, DenseNetwork) else ()
        for layer in self.modules():
            if isinstance(layer, _BatchNorm) and layer not in new:
                layer.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@dataclass(eq=False)
class Expert:
    """A pre-trained network with a head for the target task.

    name: "timm/resnet50.a1_in1k". module: normalised images [n, 3, S, S] -> [n, C], S the hub's
    input size. mean, std: what the network's images were normalised with, a value a channel, in
    units of images in [0, 1]. size: the side it works at; where that is not the hub's input size,
    ``module`` holds a ``Resized``, which resizes by ``interpolation``. model: what its source knows
    of it; None of a module of one's own. task: whose head it has; None where model is. label: what
    tables call it; the name where that is empty. spec: what was asked for.
    """

    name: str
    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    interpolation: str = "bilinear"
    model: HubModel | None = None
    task: HeadTask | None = None
    label: str = ""
    spec: ExpertSpec | None = None

    @property
    def body(self) -> nn.Module:
        """The network itself, without the wrappers around it."""
        return network(self.module)

    def features(self, x: Tensor) -> Tensor:
        """What ``head`` makes the outputs of: ``head(features(x))`` is ``module(x)``, to the bit in
        evaluation mode.

        Args:
            x: normalised images [n, 3, S, S].

        Returns:
            Of timm's networks what ``forward_features`` gives, such as a map [n, F, h, w]; of
            others the input of their last layer, as a rule [n, F].

        Raises:
            HubError: the network cannot be split, since its head is not its last layer.
        """
        for wrapper in self.module.modules():
            if wrapper is self.body:
                break
            x = wrapper.resize(x) if isinstance(wrapper, Resized) else x
        if _splits_itself(self.body):
            return self.body.forward_features(x)
        seen = []
        head = self._last_layer()
        handle = head.register_forward_hook(lambda _, args, output: seen.append((args, output)))
        try:
            output = self.body(x)
        finally:
            handle.remove()
        if len(seen) != 1 or len(seen[0][0]) != 1 or seen[0][1] is not output:
            raise self._unsplit()
        return seen[0][0][0]

    def pooled(self, x: Tensor) -> Tensor:
        """``features`` as a vector for each image: [n, 3, S, S] -> [n, F].

        Of timm's networks as they pool before their classifier; of other maps and tokens the mean
        over all places. HubError as of ``features``.
        """
        features = self.features(x)
        pool = getattr(self.body, "forward_head", None)
        if _splits_itself(self.body) and "pre_logits" in inspect.signature(pool).parameters:
            features = pool(features, pre_logits=True)
        if features.dim() == 3:  # tokens [n, places, F]
            return features.mean(dim=1)
        return features.flatten(2).mean(dim=2) if features.dim() > 2 else features

    def head(self, features: Tensor) -> Tensor:
        """``features(x)`` -> outputs [n, C, ...]."""
        if _splits_itself(self.body):
            return self.body.forward_head(features)
        return self._last_layer()(features)

    def _last_layer(self) -> nn.Module:
        layers = head_layers(self.body)
        if len(layers) != 1:
            raise self._unsplit()
        return layers[0]

    def _unsplit(self) -> HubError:
        return HubError(
            f"{self.name}: expected a network that ends with its head, or that has timm's "
            "forward_features and forward_head, to split; call its module as a whole"
        )


def _splits_itself(body: nn.Module) -> bool:
    return hasattr(body, "forward_features") and hasattr(body, "forward_head")


def network(module: nn.Module) -> nn.Module:
    """The network inside an expert's module."""
    while isinstance(module, (Resized, RunningStatistics)):
        module = module.body
    return module


def load_body(
    expert: Expert | nn.Module,
    state_dict: Mapping[str, Tensor],
    source: str = "",
    layout: Layout = Layout(),
) -> None:
    """Copies pre-trained weights into an expert, all but its head.

    expert: an ``Expert`` or its module. state_dict: of the same architecture, with a head of any
    number of outputs or none; the head's tensors are not read. source: where it comes from, for the
    messages. layout: how its tensors are named.

    Raises HubError, and leaves the expert as it was, if a tensor of the body is missing, is left
    over or has another shape: a body that is half loaded would train, badly, without a word. Only
    BatchNorm's counters of batches may be missing, as they are in old files.
    """
    module = expert.module if isinstance(expert, Expert) else expert
    body = network(module)
    heads = head_names(body)
    own = {name: tensor for name, tensor in body.state_dict().items() if name not in heads}
    files_names, left_over = layout.split(state_dict)
    if isinstance(body, DenseNetwork):
        files_names = body.names_of(files_names)
    given = {name: state_dict[n] for name, n in files_names.items() if name not in heads}
    missing = [n for n in own.keys() - given.keys() if n.rpartition(".")[2] != COUNTER]
    left_over += [files_names[name] for name in given.keys() - own.keys()]
    shapes = [
        f"{files_names[name]} ({list(given[name].shape)} instead of {list(own[name].shape)})"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    fitting = [n for n in own.keys() & given.keys() if own[n].shape == given[n].shape]
    types = [
        f"{files_names[n]} ({given[n].dtype} instead of {own[n].dtype})"
        for n in fitting
        if own[n].is_floating_point() and not _is_plain_number(given[n])
    ]
    nan = [files_names[n] for n in fitting if has_nan(given[n])]
    parts = [
        f"{len(names)} {what}: {_some(sorted(names))}"
        for what, names in (
            ("missing", [layout.prefix + name for name in missing]),
            ("left over", left_over),
            ("of another shape", shapes),
            ("of another type", types),
            ("with NaN, as of a training that diverged", nan),
        )
        if names
    ]
    if parts:
        name = expert.name if isinstance(expert, Expert) else type(body).__name__
        where = f" of {source}" if source else ""
        raise HubError(
            f"the weights{where} do not fit {name} (heads aside): tensors " + "; ".join(parts)
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                tensor.copy_(given[name])


def _is_plain_number(tensor: Tensor) -> bool:
    """Whether a tensor alone says its values, in floating point: one of 8 bits has a scale."""
    return tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_sparse


def has_nan(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds NaN; False of one without numbers, on meta."""
    return _is_plain_number(tensor) and not tensor.is_meta and bool(tensor.isnan().any())


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_IN_MESSAGE])
    rest = len(names) - NAMES_IN_MESSAGE
    return shown if rest <= 0 else f"{shown} and {rest} more"
