"""The sources ``torchvision/`` and ``moco/``.

torchvision's classifiers are taken whole. Of three networks for other tasks (Mask R-CNN, Keypoint
R-CNN, DeepLabV3) the backbone is taken, a ResNet-50, and loaded into a plain one: DeepLabV3's was
dilated, the detectors' normalised by frozen statistics (with an epsilon of 0 where a plain
BatchNorm has 1e-5). MoCo's ResNet-50 learned without labels (He et al., 2020).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, partial

from torch import Tensor, nn
from torchvision import models

from ..model.heads import mark_head
from .errors import HubError
from .expert import Layout
from .names import BACKBONES, closest
from .source import HubModel, on_meta
from .weights import WeightSource

PREFIX, MOCO_PREFIX = "torchvision/", "moco/"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NATIVE_SIZE = 224  # of backbones: what they were first trained at, and what the paper gives them

DETECTOR_LAYOUT = Layout("backbone.body.", ("backbone.fpn.", "rpn.", "roi_heads."))
BACKBONE_LAYOUTS = {
    "maskrcnn_resnet50_fpn": DETECTOR_LAYOUT,
    "keypointrcnn_resnet50_fpn": DETECTOR_LAYOUT,
    "deeplabv3_resnet50": Layout("backbone.", ("classifier.", "aux_classifier.")),
}
# The momentum encoder and the queue of negatives are MoCo's tools, as is its head (v2: an MLP).
MOCO_LAYOUT = Layout(
    "module.encoder_q.", ("module.encoder_q.fc.", "module.encoder_k.", "module.queue")
)
MOCO_URL = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/{tag}/moco_{tag}_pretrain.pth.tar"
MOCO_MD5 = {"v1_200ep": "b251726a", "v2_200ep": "59fd9945", "v2_800ep": "a04e12f8"}

# Auxiliary classifiers serve the training on ImageNet only. The weights of these two networks are
# for images that they transform themselves.
AUXILIARY = {"inception_v3": ("AuxLogits.",), "googlenet": ("aux1.", "aux2.")}
OLD_DENSE_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
WEIGHTS, DEFAULT = "_Weights", "DEFAULT"
FIXED = ("vit_", "maxvit")  # architectures built for one size


def find(name: str) -> HubModel:
    """Looks a model up by torchvision's name, without the source; HubError where there is none.

    "resnet50" stands for torchvision's default weights, "resnet50.IMAGENET1K_V1" for those, as
    does "ResNet50_Weights.IMAGENET1K_V1". Like torchvision's own, the names may be in any case.
    """
    architecture, _, tag = name.partition(".")
    architecture, tag = _by_weights(architecture, tag)
    known = (*models.list_models(module=models), *BACKBONES)
    if architecture not in known:
        if architecture in models.list_models():
            raise HubError(
                f"torchvision's {architecture!r} is no classifier; of its other networks the hub "
                f"takes the backbones of {', '.join(BACKBONES)}"
            )
        raise HubError(f"torchvision has no model {name!r}; {closest(PREFIX + name)}")
    entries = models.get_model_weights(architecture)
    tags = [entry.name for entry in entries]
    if tag and tag not in (*tags, DEFAULT):
        raise HubError(
            f"torchvision has no weights {tag!r} for {architecture!r}; it has {', '.join(tags)}"
        )
    entry = entries[tag] if tag else entries.DEFAULT
    full = f"{PREFIX}{architecture}.{entry.name}"
    weights = WeightSource(full, url=entry.url)
    if architecture in BACKBONES:
        return _resnet50(full, weights, BACKBONE_LAYOUTS[architecture])
    images = entry.transforms()
    [size] = images.crop_size
    return HubModel(
        name=full,
        native_size=size,
        fixed_size=architecture.startswith(FIXED),
        mean=tuple(images.mean),
        std=tuple(images.std),
        interpolation=images.interpolation.value,
        make=partial(_make, architecture, size),
        weights=weights,
        layout=Layout("", AUXILIARY.get(architecture, ())),
        convert=_rename_dense if architecture.startswith("densenet") else None,
    )


def _by_weights(architecture: str, tag: str) -> tuple[str, str]:
    """(architecture, tag) of a name whose parts may be those of a class of weights."""
    weights = next((part for part in (architecture, *tag.split(".")) if WEIGHTS in part), "")
    if weights:
        tag = tag.removeprefix(weights).removeprefix(".")
        if weights == architecture:
            for name in (*models.list_models(module=models), *BACKBONES):
                if models.get_model_weights(name).__name__.lower() == weights.lower():
                    architecture = name
    return architecture.lower(), tag.upper()


def find_moco(name: str) -> HubModel:
    """MoCo's "resnet50", without the source: v1 after 200 epochs, or the tag that it names."""
    architecture, _, tag = name.partition(".")
    tag = tag or "v1_200ep"
    if architecture != "resnet50" or tag not in MOCO_MD5:
        known = ", ".join(f"{MOCO_PREFIX}resnet50.{tag}" for tag in MOCO_MD5)
        raise HubError(f"there is no {MOCO_PREFIX}{name}; there are {known}")
    full = f"{MOCO_PREFIX}resnet50.{tag}"
    weights = WeightSource(full, url=MOCO_URL.format(tag=tag), md5=MOCO_MD5[tag])
    return _resnet50(full, weights, MOCO_LAYOUT)


def _resnet50(name: str, weights: WeightSource, layout: Layout) -> HubModel:
    return HubModel(
        name=name,
        native_size=NATIVE_SIZE,
        fixed_size=False,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation="bilinear",
        make=partial(_make, "resnet50", NATIVE_SIZE),
        weights=weights,
        layout=layout,
    )


def _make(architecture: str, size: int, num_outputs: int) -> nn.Module:
    network = _build(architecture, size, num_outputs)
    mark_head(network, _head_layers(architecture, size))
    return network


def _build(architecture: str, size: int, num_outputs: int) -> nn.Module:
    options = {}
    if architecture in AUXILIARY:
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif architecture.startswith("vit_"):
        options = {"image_size": size}
    return models.get_model(architecture, weights=None, num_classes=num_outputs, **options)


@cache
def _head_layers(architecture: str, size: int) -> tuple[str, ...]:
    """The layers whose shapes depend on the number of outputs: those that are new for a task."""
    two, three = (on_meta(lambda n=n: _build(architecture, size, n)).state_dict() for n in (2, 3))
    changed = [name for name, tensor in two.items() if tensor.shape != three[name].shape]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in changed))


def _rename_dense(state: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """torchvision's DenseNets lie on its server under names that Python no longer allows."""
    return {OLD_DENSE_NAME.sub(r"\1\2", name): tensor for name, tensor in state.items()}
