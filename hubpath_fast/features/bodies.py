"""A model's body: the network that computes features, built from its name, frozen.

Its weights are known by a hash, so that whoever builds the body of a shelf's model again has the
one that its features are of, or an error. Random weights are a function of (seed, name), and so can
be built again, too.

Letters: b images of a batch, S pixels a side, D features, C classes of a source head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.order import mix
from ..hub.build import start_expert
from ..hub.checkpoint import weights_files
from ..hub.errors import HubError
from ..hub.expert import Expert, load_body
from ..hub.registry import find
from ..hub.source import HubModel, PlainTask
from ..hub.spec import ExpertSpec
from ..hub.weights import fetch_all, file_digest
from ..model.features import KeptHead
from ..model.heads import head_layers, head_names
from .shelf import ShelfModel

RANDOM = "random:"  # before the hash of weights that were drawn, not read
TASK = PlainTask(2)  # of the head that a body is built with, which nobody asks


def features_of(expert: Expert, images: Tensor) -> Tensor:
    """uint8 [b, 3, S, S] -> what a linear head would get of them, float32 [b, D], on the body's
    device.

    expert: as ``open_body`` gives it, at S pixels a side. Images are normalised as ``HubPathway``
    normalises its rows.
    """
    with torch.inference_mode():
        return expert.pooled(normalised(expert, images)).float()


def normalised(expert: Expert, images: Tensor) -> Tensor:
    """uint8 [b, 3, S, S] -> float32 as the body wants them, on its device, the channels last."""
    device = next(expert.module.parameters()).device
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (expert.mean, expert.std))
    x = images.to(device, non_blocking=True).float() * (1 / (std * 255)) + -mean / std
    return x.contiguous(memory_format=torch.channels_last)


def open_body(model: ShelfModel, seed: int = 0, device: str | torch.device = "cpu") -> Expert:
    """The body that a shelf's features are of, in evaluation mode.

    Args:
        model: of the shelf.
        seed: of the shelf's record, which random weights were drawn by.

    Raises:
        HubError: its name is none of a hub; its weights cannot be fetched or read.
        ValueError: they are others than when its features were computed.
    """
    spec = ExpertSpec.parse(model.name)
    found = find(spec)
    size = model.size or spec.size or found.native_size
    if model.weights.startswith(RANDOM):
        expert = random_body(spec, found, size, seed)
        same, where = random_hash(expert) == model.weights, f"drawn by the seed {seed}"
    else:
        path = fetch_weights(found)
        same, where = weights_hash(path) == model.weights, str(path)
        expert = read_body(spec, found, size, path)[0] if same else None
    if not same:
        raise ValueError(
            f"{model.label}: its weights ({where}) are not those that its features were computed "
            "with; run hubpath shelf extract again, which computes those of the present ones"
        )
    return ready(expert, device)


def fetch_weights(model: HubModel) -> Path:
    """The local file or folder of a model's weights, downloaded if need be. Raises HubError."""
    if model.weights is None:
        raise HubError(f"{model.name} has no pre-trained weights")
    problem = model.weights.problem()
    if problem is not None:
        raise HubError(problem)
    return fetch_all([model.weights])[0]


def weights_hash(path: Path) -> str:
    """The SHA-256 of a file of weights; of several files, that of theirs. Raises HubError."""
    files = [file_digest(file, "sha256") for file in weights_files(path)]
    return files[0] if len(files) == 1 else hashlib.sha256(" ".join(files).encode()).hexdigest()


def read_body(
    spec: ExpertSpec, model: HubModel, size: int, path: Path
) -> tuple[Expert, tuple[Tensor, Tensor] | None]:
    """A body of size x size pixels with the weights of a file, and the linear head [S, D], [S] that
    the file ends with, None where there is none. Raises HubError."""
    state = model.read(path)
    expert = start_expert(spec, model, TASK, size)
    load_body(expert, state, str(path), model.layout)
    return expert, _source_head(expert, state)


def random_body(spec: ExpertSpec, model: HubModel, size: int, seed: int) -> Expert:
    """A body with random weights, a function of the seed and the model's name."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix(seed, "weights", model.name))
        return start_expert(spec, model, TASK, size)


def random_hash(expert: Expert) -> str:
    """``RANDOM`` and the SHA-256 of a body's tensors, in the order of their names."""
    digest = hashlib.sha256()
    heads = head_names(expert.body)
    for name, tensor in sorted(expert.body.state_dict().items()):
        if name not in heads:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return RANDOM + digest.hexdigest()


def ready(expert: Expert, device: str | torch.device) -> Expert:
    """The expert as features are computed with it."""
    module = expert.module.eval().requires_grad_(False)
    expert.module = module.to(device=device, memory_format=torch.channels_last)
    return expert


def ends_linearly(expert: Expert, images: Tensor) -> bool:
    """Whether the outputs for images, uint8 [b, 3, S, S], are those of one linear layer of their
    features, in whose place another such layer can stand."""
    x = normalised(expert, images)
    try:
        with torch.inference_mode():
            head = KeptHead(expert.body, expert.name)
            seen, features = head.see(expert.body, x), expert.pooled(x)
            if seen.flatten(1).shape != features.shape:
                return False
            linear = F.linear(features, head.layer.weight.flatten(1), head.layer.bias)
            outputs = head.layer(seen).flatten(1)
            return _alike(seen.flatten(1), features) and _alike(outputs, linear)
    except (ValueError, AttributeError):  # no such layer, or several
        return False


def _alike(one: Tensor, other: Tensor) -> bool:
    """But for sums in another order."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _source_head(expert: Expert, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The head among a file's tensors, where that is one layer of a weight and perhaps a bias."""
    own = head_names(expert.body)
    files_names, _ = expert.model.layout.split(state)
    found = {
        name.rpartition(".")[2]: state[files_name].float()
        for name, files_name in files_names.items()
        if name in own
    }
    weight, bias = found.pop("weight", None), found.pop("bias", None)
    if len(head_layers(expert.body)) != 1 or weight is None or weight.dim() < 2 or found:
        return None
    if bias is None:
        bias = torch.zeros(len(weight))
    return (weight.flatten(1), bias) if bias.shape == weight.shape[:1] else None
