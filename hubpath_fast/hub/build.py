"""From names to experts: everything that can be wrong is said at once, before any download."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from . import timm_models
from .errors import HubError
from .expert import Expert
from .weights import fetch_all


def find(name: str) -> timm_models.TimmModel:
    """Looks a name up: "resnet50.a1_in1k", or the same with its source, "timm/resnet50.a1_in1k"."""
    source, slash, rest = name.strip().rpartition("/")
    if slash and source != "timm":
        raise HubError(
            [f"{name!r} has the unknown source {source!r}; write timm/NAME or only timm's NAME"]
        )
    return timm_models.find(rest)


def find_all(names: Sequence[str]) -> list[timm_models.TimmModel]:
    """Looks all names up; HubError with every name that is wrong."""
    if isinstance(names, str) or not names:
        raise HubError([f"names is {names!r}, but must be a sequence of at least one model name"])
    models, problems = _find_all(names)
    if problems:
        raise HubError(problems)
    return models


def default_input_size(names: Sequence[str]) -> int:
    """Pixels a side that suit a hub: what most of its models were pre-trained at.

    Among equally frequent sides the smallest, since cost grows with the square of the side.
    """
    counts = Counter(model.native_size for model in find_all(names))
    return min(counts, key=lambda size: (-counts[size], size))


def build_experts(
    names: Sequence[str],
    num_outputs: int,
    pretrained: bool = True,
    input_size: int | None = None,
    resize_to_native: bool = False,
) -> list[Expert]:
    """Builds a hub.

    names: timm's model names; one may occur more than once. num_outputs: C, outputs of each head.
    pretrained: load the weights that the name stands for, from the local cache or else the
    network; False: random weights, no network. input_size: pixels a side of the images that the
    hub will be given; None: ``default_input_size(names)``.

    A network takes images of input_size as they are wherever its architecture can. One that was
    built for its native size alone resizes them inside. resize_to_native: every network does.

    Raises HubError with all problems of the hub, before anything is downloaded: unknown names (with
    the closest), names without weights, networks that cannot take the input size (with sizes that
    they take), and then weights that cannot be fetched (which, from where, to where).
    """
    if num_outputs < 1:
        raise HubError([f"num_outputs is {num_outputs}, but must be at least 1"])
    if isinstance(names, str) or not names:
        raise HubError([f"names is {names!r}, but must be a sequence of at least one model name"])
    if input_size is not None and input_size < 1:
        raise HubError([f"input_size is {input_size}, but must be a number of pixels, at least 1"])

    models, problems = _find_all(names)
    if input_size is None and models:
        input_size = default_input_size([model.name for model in models])
    sizes = []
    for model in models:
        try:
            sizes.append(_working_size(model, num_outputs, input_size, resize_to_native))
        except HubError as error:
            problems += error.problems
        if pretrained and model.weights is None:
            problems.append(
                f"{model.full_name} has no pre-trained weights; take another name, or random "
                "weights for all with pretrained=False (--no-pretrained)"
            )
    if problems:
        raise HubError(list(dict.fromkeys(problems)))  # a name that occurs twice is said once

    paths = fetch_all([model.weights for model in models]) if pretrained else [None] * len(models)
    return [
        timm_models.build(model, num_outputs, input_size, size, path)
        for model, size, path in zip(models, sizes, paths, strict=True)
    ]


def normalization(experts: Sequence[Expert]) -> tuple[Tensor, Tensor]:
    """(mean, std) of the experts' images, float32 [M, 3] each, in units of images in [0, 1]."""
    mean = torch.tensor([expert.mean for expert in experts])
    return mean, torch.tensor([expert.std for expert in experts])


def _find_all(names: Sequence[str]) -> tuple[list[timm_models.TimmModel], list[str]]:
    models, problems = [], []
    for name in names:
        try:
            models.append(find(name))
        except HubError as error:
            problems += error.problems
    return models, problems


def _working_size(model, num_outputs: int, input_size: int, resize_to_native: bool) -> int:
    size = model.native_size if resize_to_native else input_size
    reason = timm_models.refusal(model, num_outputs, size)
    if reason is None:
        return size
    if model.fixed_size and size != model.native_size:
        return _working_size(model, num_outputs, input_size, resize_to_native=True)
    sizes = timm_models.accepted_sizes(model, num_outputs)
    allowed = f"it takes, for example, {', '.join(map(str, sizes))}" if sizes else "no size fits"
    raise HubError([f"{model.full_name} refuses images of {size} x {size} ({reason}); {allowed}"])
