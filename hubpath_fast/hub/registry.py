"""Every name of an expert, by its source, to what is known of it.

    timm/NAME[.TAG]             any of timm's models; the source may be left out
    torchvision/NAME[.WEIGHTS]  torchvision's classifiers, and the backbones of
                                maskrcnn_resnet50_fpn, keypointrcnn_resnet50_fpn, deeplabv3_resnet50
    moco/resnet50[.TAG]         v1_200ep (the default), v2_200ep, v2_800ep
    file/PATH?arch=NAME         a local state dict (.pth, .safetensors) of the model NAME
    local-dir:PATH              a folder as timm saves one

Importing this module imports neither timm nor torchvision: a name imports the library it needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .errors import HubError
from .expert import load_body
from .names import WILDCARDS, list_models
from .source import HubModel, PlainTask, skeleton
from .spec import ExpertSpec
from .weights import WeightSource

SOURCES = ("timm/NAME", "torchvision/NAME", "moco/resnet50", "file/PATH?arch=NAME",
           "local-dir:PATH")  # fmt: skip
FILE_PREFIX, FOLDER_PREFIX = "file/", "local-dir:"
DATA_PARALLEL = "module."


def find(spec: ExpertSpec | str) -> HubModel:
    """Looks an expert up. HubError says what is wrong with its name, with the closest ones."""
    spec = ExpertSpec.parse(spec) if isinstance(spec, str) else spec
    if isinstance(spec.name, nn.Module):
        raise HubError(f"{spec.label} is a module: it has no entry in the registry")
    name = spec.name.strip()
    if name.startswith(FILE_PREFIX):
        model = _find_file(name, spec.arch)
    elif spec.arch is not None:
        raise HubError(f"{name}: arch is for {FILE_PREFIX}PATH alone; leave it out")
    elif name.startswith(FOLDER_PREFIX):
        from .timm_models import find_folder

        model = find_folder(name.removeprefix(FOLDER_PREFIX))
    else:
        model = _find_name(name)
    changed = {k: getattr(spec, k) for k in ("mean", "std") if getattr(spec, k) is not None}
    return dataclasses.replace(model, **changed) if changed else model


def _find_name(name: str) -> HubModel:
    source, slash, rest = name.partition("/")
    if any(mark in name for mark in WILDCARDS):
        found = list_models(name)
        some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise HubError(
            f"{name!r} is a pattern of {len(found)} names ({some}); a hub takes names, "
            f"`hubpath hub list {name!r}` lists them"
        )
    if not slash:
        source, rest = "timm", name
    if source == "timm":
        from .timm_models import find as find_timm

        return find_timm(rest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's on its image library
        from .torchvision_models import find as find_torchvision
        from .torchvision_models import find_moco
    if source == "torchvision":
        return find_torchvision(rest)
    if source == "moco":
        return find_moco(rest)
    raise HubError(
        f"{name!r} has the unknown source {source!r}; there are {', '.join(SOURCES)}, and the "
        "named hubs of `hubpath hub list`"
    )


def _find_file(name: str, arch: str | None) -> HubModel:
    path = Path(name.removeprefix(FILE_PREFIX)).expanduser()
    if not arch:
        raise HubError(
            f"{name} does not say whose weights it holds; add the model: {name}?arch=timm/NAME, "
            "?arch=torchvision/NAME or ?arch=moco/resnet50"
        )
    try:
        model = _find_name(arch)
    except HubError as error:
        raise HubError(*(f"{name}?arch={arch}: {problem}" for problem in error.problems)) from None

    def convert(state: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
        return _as_saved(model, state, source)

    full = f"{FILE_PREFIX}{path}?arch={model.name}"
    return dataclasses.replace(
        model, name=full, weights=WeightSource(full, path=path), convert=convert
    )


def _as_saved(model: HubModel, state: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """A file's tensors as the network names them, whatever number of classes its head has.

    Names that all begin with "module." come from a DataParallel wrapper. A file that does not fit
    as it is may be one that the model's own source would rename.
    """
    if all(name.startswith(DATA_PARALLEL) for name in state) and not model.layout.prefix:
        state = {name.removeprefix(DATA_PARALLEL): tensor for name, tensor in state.items()}
    if model.convert is None:
        return state
    try:
        load_body(skeleton(model, PlainTask(2)), state, source, model.layout)
    except HubError:
        with contextlib.suppress(HubError):  # neither fits: the one as it is will be reported
            return model.convert(state, source)
    return state
