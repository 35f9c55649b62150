"""Every name of an expert, by its source, to what is known of it.

    timm/NAME[.TAG]             any of timm's models; the source may be left out
    torchvision/NAME[.WEIGHTS]  torchvision's classifiers, and the backbones of
                                maskrcnn_resnet50_fpn, keypointrcnn_resnet50_fpn, deeplabv3_resnet50
    moco/resnet50[.TAG]         v1_200ep (the default), v2_200ep, v2_800ep
    package/NAME                weights in an installed Python package, see ``packages``
    file/PATH?arch=NAME         a local file or folder of weights of the model NAME
    local-dir:PATH              a folder as timm saves one
    hf-hub:USER/NAME[@REVISION] a repository of the Hugging Face hub, as timm saves one

Other tools' forms of these names are read as well, see ``aliases``.

Importing this module imports neither timm nor torchvision: a name imports the library it needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from ..model.heads import head_names
from .aliases import FILE_PREFIX, FOLDER_PREFIX, LOCAL, REPOSITORY_PREFIX, canonical, local_path
from .checkpoint import ENDINGS
from .errors import HubError
from .expert import COUNTER, load_body
from .names import WILDCARDS, list_models
from .prefixes import strip_prefix
from .source import HubModel, PlainTask, skeleton
from .spec import FILE_OPTIONS, ExpertSpec
from .weights import WeightSource

SOURCES = ("timm/NAME", "torchvision/NAME", "moco/resnet50", "package/NAME",
           "file/PATH?arch=NAME", "local-dir:PATH", "hf-hub:USER/NAME")  # fmt: skip


def find(spec: ExpertSpec | str) -> HubModel:
    """Looks an expert up. HubError says what is wrong with its name, with the closest ones."""
    spec = ExpertSpec.parse(spec) if isinstance(spec, str) else spec
    if isinstance(spec.name, nn.Module):
        raise HubError(f"{spec.label} is a module: it has no entry in the registry")
    name = canonical(spec.name)
    for option in FILE_OPTIONS:
        homes = (FILE_PREFIX,) if option == "arch" else LOCAL
        if getattr(spec, option) is not None and not name.startswith(homes):
            raise HubError(f"{name}: {option} is for {FILE_PREFIX}PATH alone; leave it out")
    if name.startswith(FILE_PREFIX):
        model = _find_file(name, spec)
    elif name.startswith(FOLDER_PREFIX):
        from .timm_models import find_folder

        model = find_folder(local_path(name.removeprefix(FOLDER_PREFIX)))
        model = _own_names(model, spec, model)
    else:
        model = _find_name(name)
    changed = {k: getattr(spec, k) for k in ("mean", "std") if getattr(spec, k) is not None}
    return dataclasses.replace(model, **changed) if changed else model


def _find_name(name: str) -> HubModel:
    source, slash, rest = name.partition("/")
    if name.startswith(REPOSITORY_PREFIX):
        from .timm_models import find_repository

        return find_repository(name.removeprefix(REPOSITORY_PREFIX))
    if name.lower().endswith(ENDINGS):
        raise HubError(
            f"{name!r} is no name of a model; a file is named {FILE_PREFIX}PATH?arch=NAME"
        )
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
    if source == "package":
        from .packages import find as find_package

        return find_package(rest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's on its image library
        from .torchvision_models import find as find_torchvision
        from .torchvision_models import find_moco
    if source == "torchvision":
        return find_torchvision(rest)
    if source == "moco":
        return find_moco(rest)
    repository = f"; a repository of the Hugging Face hub is {REPOSITORY_PREFIX}{name}"
    raise HubError(
        f"{name!r} has the unknown source {source!r}; there are {', '.join(SOURCES)}, and the "
        f"named hubs of `hubpath hub list`{repository if rest and '/' not in rest else ''}"
    )


def _find_file(name: str, spec: ExpertSpec) -> HubModel:
    path = local_path(name.removeprefix(FILE_PREFIX))
    if not spec.arch:
        raise HubError(
            f"{name} does not say whose weights it holds; add the model: {name}?arch=timm/NAME, "
            "?arch=torchvision/NAME or ?arch=moco/resnet50"
        )
    try:
        model = _find_name(canonical(spec.arch))
    except HubError as error:
        raise HubError(
            *(f"{name}?arch={spec.arch}: {problem}" for problem in error.problems)
        ) from None
    full = f"{FILE_PREFIX}{path}?arch={model.name}"
    found = dataclasses.replace(model, name=full, weights=WeightSource(full, path=path))
    return _own_names(found, spec, model)


def _own_names(model: HubModel, spec: ExpertSpec, architecture: HubModel) -> HubModel:
    """The model, whose file's tensors have the names that a user's tools gave them. architecture:
    that the names are of, and of which one skeleton is enough for many files."""
    return dataclasses.replace(
        model, entry=spec.key, convert=partial(_as_saved, architecture, spec.prefix)
    )


def _as_saved(
    model: HubModel, prefix: str | None, state: Mapping[str, Tensor], source: str
) -> Mapping[str, Tensor]:
    """A file's tensors as the network names them, whatever number of classes its head has.

    A file that does not fit as it is may be one that the model's own source would rename.
    """
    network = skeleton(model, PlainTask(2))
    heads = head_names(network)
    body = {
        name
        for name in network.state_dict()
        if name not in heads and name.rpartition(".")[2] != COUNTER
    }
    state = strip_prefix(state, body, model.layout.prefix, prefix, source)
    if model.convert is None:
        return state
    try:
        load_body(network, state, source, model.layout)
    except HubError:
        with contextlib.suppress(HubError):  # neither fits: the one as it is will be reported
            return model.convert(state, source)
    return state
