"""A head on the last map of a network, in the place of pooling and classifier.

What comes before a network's pooling is a map [n, F, h, w] of a cell every ``stride`` pixels, or
can be made one: Swin's is [n, h, w, F], a ViT's are tokens [n, k + h*w, F], k of them of no place.
timm calls it ``forward_features``; of torchvision's networks ``MAPS`` says which parts make it.

Letters: n images, F channels of the map, h x w cells, S pixels a side, C outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.heads import mark_head
from .errors import HubError
from .outputs import copy_to, describe

# Pixels a side that a network is tried at: of 256 every usual stride is a divisor; then its own.
TRIED, USUAL_SIZE = 256, 224
SMALLEST_STRIDE, LARGEST_STRIDE = 4, 64  # of 256 pixels, 64 and four cells a side
# Of CaiT, VOLO and XCiT: they look at the map, and change the class token alone.
CLASS_BLOCKS = ("blocks_token_only", "post_network", "cls_attn_blocks")

# torchvision's networks, by the names of their classes, and the parts that make the last map.
MAPS: dict[str, tuple[str | Callable[[Tensor], Tensor], ...]] = {
    "ResNet": ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
    "RegNet": ("stem", "trunk_output"),
    "ShuffleNetV2": ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
    "MNASNet": ("layers",),
    "DenseNet": ("features", F.relu),
    "SwinTransformer": ("features", "norm"),
    "MaxVit": ("stem", "blocks"),
    "GoogLeNet": (
        "_transform_input", "conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a",
        "inception3b", "maxpool3", "inception4a", "inception4b", "inception4c", "inception4d",
        "inception4e", "maxpool4", "inception5a", "inception5b",
    ),
    **dict.fromkeys(
        ("MobileNetV2", "MobileNetV3", "EfficientNet", "ConvNeXt", "VGG"), ("features",)
    ),
}  # fmt: skip


class DenseNetwork(nn.Module):
    """A network whose last map goes to a head of its own: [n, 3, S, S] -> what the head gives.

    ``forward_features`` gives the map, ``forward_head`` the outputs, as in timm's networks. What
    the map does not need, such as the classifier, is taken out of the network, so that every
    parameter has a gradient.

    Args:
        backbone: a network of timm or torchvision with any classifier or none, changed in place;
            or a ``DenseNetwork``, whose head is then another.
        make_head: (F, stride) -> a module, maps [n, F, h, w] -> outputs; stride, a power of two,
            is the pixels a side that stand behind a cell.

    image_size: pixels a side of the images that the outputs are about; None: of the images given.
    Where those are resized for the network, or where its cells are of another size than ``stride``
    (14 pixels of some ViTs), the map is resized, bilinearly, to image_size / stride cells a side.

    removed: names that the network's state dict has no longer.

    Raises:
        HubError: a network without a map, or with parts that the map does not need and that cannot
            be taken out.
    """

    row_wise = True  # see ``executors.graphs``
    prefix = "backbone"  # of the names of the network's layers; the others are the head's

    def __init__(self, backbone: nn.Module, make_head: Callable[[int, int], nn.Module]):
        super().__init__()
        known: tuple[str, ...] = ()
        if isinstance(backbone, DenseNetwork):
            backbone, known = backbone.backbone, backbone.removed
        before = list(backbone.state_dict())
        _take_any_size(backbone)
        for name in CLASS_BLOCKS:
            if isinstance(getattr(backbone, name, None), nn.ModuleList):
                setattr(backbone, name, nn.ModuleList())
        self.found = _find_map(backbone)
        _remove(backbone, self.found.unused)
        after = backbone.state_dict().keys()
        self.removed = known or tuple(name for name in before if name not in after)
        self.image_size: int | None = None
        self.backbone = backbone
        self.head = make_head(self.found.channels, self.found.stride)
        mark_head(self, ("head",))

    @property
    def stride(self) -> int:
        return self.found.stride

    @property
    def feature_info(self) -> list[dict] | None:
        """timm's, of layers as they are called here."""
        info = getattr(self.backbone, "feature_info", None)
        if not isinstance(info, list):
            return None
        return [{**entry, "module": f"{self.prefix}.{entry['module']}"} for entry in info]

    def names_of(self, names: Mapping[str, str]) -> dict[str, str]:
        """The same mapping from names of the whole, where it is one from names of the plain
        backbone, classifier and all."""
        if any(name.startswith(f"{self.prefix}.") for name in names):
            return dict(names)
        kept = {name: other for name, other in names.items() if name not in self.removed}
        return {f"{self.prefix}.{name}": other for name, other in kept.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images [n, 3, S, S] -> the map [n, F, h, w]."""
        features = self.found.arrange(_features(self.backbone, x))
        side = max(1, (self.image_size or x.shape[-1]) // self.stride)
        if features.shape[2:] == (side, side):
            return features
        return resized(features, side)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, channels={self.found.channels}"


@dataclass(frozen=True)
class LastMap:
    """A network's last map. channels: F. stride: the power of two next to the pixels a side of a
    cell. axes: "nchw", "nhwc" or "tokens". prefix: tokens of no place, which come first. unused:
    names of the parameters that it does not depend on."""

    channels: int
    stride: int
    axes: str
    prefix: int = 0
    unused: tuple[str, ...] = ()

    def arrange(self, features: Tensor) -> Tensor:
        """What the network gives -> [n, F, h, w]."""
        if self.axes == "nhwc":
            return features.permute(0, 3, 1, 2)
        if self.axes == "tokens":
            places = features[:, self.prefix :].transpose(1, 2)
            return places.unflatten(2, (math.isqrt(places.shape[2]), -1))
        return features


def resized(maps: Tensor, side: int) -> Tensor:
    """[n, F, h, w] -> [n, F, side, side]: ``F.interpolate``, bilinear and antialiased, as products
    with matrices, whose gradients on a GPU repeat to the bit where those of its kernel do not."""
    exact = torch.promote_types(maps.dtype, torch.float32)

    def weights(cells: int) -> Tensor:
        one = torch.eye(cells, dtype=exact, device=maps.device)[None, None]
        weights = F.interpolate(one, (side, cells), mode="bilinear", antialias=True)
        return weights[0, 0].to(maps.dtype)

    return weights(maps.shape[2]) @ maps @ weights(maps.shape[3]).T


def about_images(network: nn.Module, size: int | None) -> nn.Module:
    """The network, of the same tensors, for images of ``size`` pixels a side that were resized for
    it; None: of whatever size they are."""
    if isinstance(network, DenseNetwork) and size is not None:
        network = copy.copy(network)
        network.image_size = size
    return network


def _features(network: nn.Module, x: Tensor) -> Tensor:
    """What a network makes of images before it pools."""
    if hasattr(network, "forward_features"):
        return network.forward_features(x)
    kind = _torchvision_kind(network)
    if kind == "VisionTransformer":
        x = network._process_input(x)
        start = network.class_token.expand(len(x), -1, -1)
        return network.encoder(torch.cat([start, x], dim=1))
    for part in MAPS[kind]:
        step = getattr(network, part) if isinstance(part, str) else part
        for layer in step if isinstance(step, nn.ModuleList) else (step,):
            x = layer(x)
    return x


def _torchvision_kind(network: nn.Module) -> str | None:
    """The class of torchvision that a network is of; None: none whose map is known."""
    for kind in type(network).__mro__:
        known = kind.__name__ in MAPS or kind.__name__ == "VisionTransformer"
        if known and kind.__module__.startswith("torchvision."):
            return kind.__name__
    return None


def _find_map(network: nn.Module) -> LastMap:
    """Tries a network on images without pixels; HubError where it has no map."""
    name = type(network).__name__
    if not hasattr(network, "forward_features") and _torchvision_kind(network) is None:
        raise HubError(
            f"{name} exposes no map: expected a network of timm with forward_features, or one of "
            f"torchvision's {', '.join(MAPS)}, VisionTransformer; take another network"
        )
    for size in dict.fromkeys((TRIED, _own_size(network))):
        try:
            return _try_map(network, size)
        except Exception as error:  # each architecture has its own way to refuse
            reason = f"for two images of {size} px {str(error) or type(error).__name__}"
    raise HubError(
        f"{name} exposes no map that a head can use: {reason}. Expected [2, F, h, h], [2, h, h, F] "
        f"or tokens [2, k + h*h, F], cells of {SMALLEST_STRIDE} to {LARGEST_STRIDE} pixels a side; "
        "take another network"
    )


def _own_size(network: nn.Module) -> int:
    """Pixels a side that a network was made for, as far as it says."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    size = cfg.get("input_size", (3, USUAL_SIZE))[-1]
    return getattr(network, "image_size", size)


def _try_map(network: nn.Module, size: int) -> LastMap:
    """Raises whatever the network does, and ValueError."""
    twin = copy_to(network, torch.device("meta")).eval().requires_grad_(True)
    called: set[nn.Module] = set()
    for layer in twin.modules():
        layer.register_forward_pre_hook(lambda layer, _: called.add(layer))
    with torch.enable_grad():
        features = _features(twin, torch.empty(2, 3, size, size, device="meta"))
        found = _read_map(network, features, size)
        found.arrange(features).sum().backward()
    unused = [name for name, parameter in twin.named_parameters() if parameter.grad is None]
    stuck = [name for name in unused if twin.get_submodule(name.rpartition(".")[0]) in called]
    if stuck:
        raise ValueError(f"its {stuck[0]} is of no use to the map, and cannot be taken out")
    return LastMap(found.channels, found.stride, found.axes, found.prefix, tuple(unused))


def _read_map(network: nn.Module, features: Tensor, size: int) -> LastMap:
    """The map in what a network gives for images of that size, by its shape."""
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        raise ValueError(f"it gives {describe(features)}")
    _, *shape = features.shape
    axes, prefix = "tokens", 0
    if len(shape) == 2:
        places, channels = shape
        prefix = getattr(network, "num_prefix_tokens", places - math.isqrt(places) ** 2)
        side = math.isqrt(max(0, places - prefix))
        square = side**2 == places - prefix
    else:
        last = shape[0] == shape[1] != shape[2] or getattr(network, "output_fmt", "") == "NHWC"
        axes, channels, side = ("nhwc", shape[2], shape[0]) if last else ("nchw", *shape[:2])
        square = shape[1] == (shape[0] if last else shape[2])
    if not square:
        raise ValueError(f"it gives {describe(features)}, which is no square map")
    cell = size / side if side else math.inf
    if not SMALLEST_STRIDE <= cell <= LARGEST_STRIDE:
        raise ValueError(f"it gives {describe(features)}, whose cells are {cell:g} pixels a side")
    if size % side:  # convolutions without padding: the cells do not reach the borders
        raise ValueError(f"it gives {describe(features)}, cells that do not cover the image evenly")
    return LastMap(channels, 2 ** round(math.log2(cell)), axes, prefix)


def _remove(network: nn.Module, names: tuple[str, ...]) -> None:
    """Takes parameters out of a network: the layers that hold them become nothing."""
    for name in names:
        path, _, own = name.rpartition(".")
        holder = network.get_submodule(path)
        if not path or any(True for _ in holder.children()):
            setattr(holder, own, None)
        elif not isinstance(holder, nn.Identity):
            parent, _, child = path.rpartition(".")
            setattr(network.get_submodule(parent), child, nn.Identity())


def _take_any_size(network: nn.Module) -> None:
    """timm's ViTs were made for images of one size, and take any multiple of their patches if told
    so: positions are then resampled. What they make of images of that size stays the same."""
    embed = getattr(network, "patch_embed", None)
    known = {kind.__name__ for kind in type(network).__mro__} & {"VisionTransformer", "Eva"}
    fixed = getattr(network, "dynamic_img_size", True) is False
    if known and fixed and hasattr(embed, "strict_img_size") and hasattr(embed, "flatten"):
        network.dynamic_img_size = True
        embed.strict_img_size, embed.flatten = False, False
        embed.output_fmt = type(embed.output_fmt)("NHWC")
