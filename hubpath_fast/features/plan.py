"""What an extraction has to do: for each model its size, its cost, its file, and whether that is
there.

Nothing is built for it: shapes come from torch's meta device, once for each architecture and size,
and weights are known by the hash of their file. The key of a file of features is a hash of all that
they depend on, so what is there under its key need not be computed.

Letters: n images, V views, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..data.cache import cache_bytes
from ..data.transforms import check_size
from ..hub.aliases import FILE_PREFIX
from ..hub.costs import TASK, costs
from ..hub.errors import HubError
from ..hub.expert import Expert
from ..hub.labels import expert_names
from ..hub.registry import find
from ..hub.source import HubModel, skeleton
from ..hub.spec import ExpertSpec
from ..model.heads import split_parameters
from ..preprocessing import resized_side
from .bodies import RANDOM, weights_hash
from .shelf import DTYPES, FORMAT, Shelf, ShelfModel, ShelfRecord

LARGEST_BATCH = 256
# Of a layer's output. Larger ones glibc's malloc takes from the system and gives back each time:
# at 64 images of 160 px a test_resnet takes twice as long for an image as at 16.
LAYER_BYTES_ON_HOST = 32 * 2**20
# Of what training would keep of a batch. A forward pass holds about a tenth of that at a time.
ACTIVATION_BYTES_ON_DEVICE = 24 * 2**30


@dataclass(frozen=True)
class Shapes:
    """Of a body at a size. num_features: D. parameters, flops: of an image's forward pass, None
    where torch cannot count them. work: what an image costs, beside other bodies'.
    activation_bytes: what training would keep of it. layer_bytes: of the largest output of a
    layer."""

    size: int
    num_features: int
    parameters: int
    flops: int | None
    work: int
    activation_bytes: int
    layer_bytes: int

    def batch_size(self, device: torch.device) -> int:
        """A power of two, the same whenever it is asked: sums over batches of another size may
        differ in their last bits."""
        room = ACTIVATION_BYTES_ON_DEVICE // max(1, self.activation_bytes)
        if device.type == "cpu":
            room = LAYER_BYTES_ON_HOST // max(1, self.layer_bytes)
        return min(LARGEST_BATCH, 1 << (max(1, room).bit_length() - 1))


@dataclass(frozen=True)
class Planned:
    """A model whose features are to be computed. replaces: the one of the same name with other
    weights, or of another library's version, whose file goes when it is done."""

    spec: ExpertSpec
    model: HubModel
    label: str
    position: int
    shapes: Shapes
    replaces: ShelfModel | None = None

    @property
    def name(self) -> str:
        return str(self.spec)


@dataclass(frozen=True)
class Plan:
    """there: on the shelf already. pending: to compute, the smallest images first. failed: (name,
    reason)."""

    there: tuple[ShelfModel, ...]
    pending: tuple[Planned, ...]
    failed: tuple[tuple[str, str], ...]

    @property
    def sizes(self) -> set[int]:
        """Of the images of all its models."""
        return {m.size for m in self.there if m.size} | {p.shapes.size for p in self.pending}

    def features_bytes(self, record: ShelfRecord) -> int:
        return sum(features_bytes(record, p.shapes.num_features) for p in self.pending)

    def disk_bytes(self, record: ShelfRecord, router: bool) -> int:
        """That must be free: features for good, and meanwhile the decoded images of one size and
        the features of one model again. router: its pixels are still to be written."""
        if not self.pending:
            return 0
        n = record.num_images
        squares = max(cache_bytes(n, resized_side(p.shapes.size)) for p in self.pending)
        again = max(features_bytes(record, p.shapes.num_features) for p in self.pending)
        pixels = record.views * cache_bytes(n, record.router_size) if router else 0
        return self.features_bytes(record) + squares + max(again, pixels) + pixels


def features_bytes(record: ShelfRecord, num_features: int) -> int:
    """Of a model's file, whose header is small."""
    return record.views * record.num_images * num_features * DTYPES[record.dtype].itemsize


def make_plan(
    shelf: Shelf,
    wanted: Sequence[tuple[ExpertSpec, HubModel]],
    stop: Callable[[], None] = lambda: None,
) -> Plan:
    """wanted: as ``wanted.read_names`` gives them. stop: is asked now and then, and raises."""
    names = [str(spec) for spec, _ in wanted]
    others = [model for model in shelf.models if model.name not in names]
    labels = expert_names([*(model.name for model in others), *names])[len(others) :]
    first = max((model.position for model in others), default=-1) + 1
    taken = set(shelf.labels)
    known = {model.name: model for model in shelf.models}
    there, pending, failed = [], [], []
    for i, (spec, model) in enumerate(wanted):
        stop()
        own = known.get(names[i])
        try:
            weights = _weights_known(shelf.record, model, own)
            if own and own.key == key_of(shelf.record, names[i], model, own.size, weights):
                there.append(own)
                continue
            shapes = _shapes_of(spec, model, shelf.record.image_size)
        except HubError as error:
            failed.append((names[i], str(error)))
            continue
        label, position = labels[i], first + i
        if own is not None:
            label, position = own.label, own.position
        else:
            number = 1
            while label in taken:
                label, number = f"{labels[i]} #{number}", number + 1
            taken.add(label)
        pending.append(Planned(spec, model, label, position, shapes, own))
    pending.sort(key=lambda p: p.shapes.size)
    return Plan(tuple(there), tuple(pending), tuple(failed))


def key_of(
    record: ShelfRecord, name: str, model: HubModel, size: int | None, weights: str | None
) -> str:
    """Of the file of a model's features: a hash of all that they are a function of."""
    drawn = [record.seed, record.flip, record.min_area] if record.views > 1 else None
    libraries = [version("timm"), version("torchvision")]
    told = [
        FORMAT, weights, name, size, model.mean, model.std, "pooled", record.views, drawn,
        record.dtype, record.digest, libraries,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(told).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def drawn_weights(record: ShelfRecord) -> str:
    """What stands in a key for weights that are drawn: torch's version decides, too."""
    return f"{RANDOM}{record.seed} torch {torch.__version__}"


def _weights_known(record: ShelfRecord, model: HubModel, own: ShelfModel | None) -> str | None:
    """Their hash, without a download; of those that are not on this machine what the shelf says.
    None: not known. Raises HubError of a file that cannot be read."""
    if not record.pretrained:
        return drawn_weights(record)
    path = model.weights.cached()
    if path is None:
        return own.weights if own is not None else None
    return weights_hash(path)


def _shapes_of(spec: ExpertSpec, model: HubModel, image_size: int | None) -> Shapes:
    """Raises HubError: it takes no such images, or has no features."""
    if spec.name.startswith(FILE_PREFIX):  # hundreds of files may be of one architecture
        model = find(spec.arch)
    size = spec.size or image_size or model.native_size
    try:
        check_size(size)
    except ValueError as error:
        raise HubError(f"{spec.label}: {error}") from error
    try:
        return _shapes(model, size)
    except HubError:
        if spec.size is not None or not model.fixed_size or size == model.native_size:
            raise
    return _shapes(model, model.native_size)


@dataclass(frozen=True)
class _Structure:
    """A network by what it prints and the shapes of its tensors: many sets of weights are of one,
    and counting takes a second."""

    text: str
    model: HubModel = field(compare=False)


def _shapes(model: HubModel, size: int) -> Shapes:
    network = skeleton(model, TASK)
    tensors = [(name, tensor.shape) for name, tensor in network.state_dict().items()]
    return _counted(_Structure(f"{network} {tensors}", model), size)


@lru_cache(maxsize=1024)
def _counted(structure: _Structure, size: int) -> Shapes:
    model = structure.model
    counted = costs(model, size)
    network = skeleton(model, TASK)
    expert = Expert(model.name, network, model.mean, model.std, size)
    outputs: list[int] = []

    def watch(module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.numel() * output.element_size())

    try:
        with torch.no_grad(), register_module_forward_hook(watch):
            features = expert.pooled(torch.empty(1, 3, size, size, device="meta"))
    except HubError:
        raise
    except Exception as error:  # each network has its own way to refuse
        raise HubError(f"{model.name} gives no features at {size} x {size}: {error}") from error
    if features.dim() != 2:
        raise HubError(
            f"{model.name} gives features {list(features.shape[1:])} for an image, expected [D]"
        )
    parameters = sum(p.numel() for p in split_parameters(network)[0])
    return Shapes(
        size,
        features.shape[1],
        parameters,
        counted.flops,
        counted.work,
        counted.activation_bytes,
        max(outputs, default=0),
    )
