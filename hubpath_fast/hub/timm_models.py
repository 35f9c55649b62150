"""The source ``timm/``, any of timm's models, and ``local-dir:`` and ``hf-hub:``, a folder and a
repository as timm saves them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from .aliases import FOLDER_PREFIX, REPOSITORY_PREFIX
from .checkpoint import INDEX_ENDING, PICKLED, SAFE
from .errors import HubError
from .names import closest
from .source import HubModel
from .weights import WeightSource, fetch_config

PREFIX = "timm/"
CONFIG = "config.json"


def find(name: str) -> HubModel:
    """Looks a model up by timm's name, without the "timm/"; HubError where there is none.

    A name of timm before 0.9 stands for its present one, as in ``timm.create_model``, and a warning
    says so.
    """
    name = _present_name(name)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise HubError(f"timm has no model {name!r}; {closest(PREFIX + name)}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:  # the architecture exists, the tag does not
        tags = timm.list_pretrained(f"{architecture}.*")
        known = f"it has {', '.join(tags)}" if tags else "it has no pre-trained weights"
        raise HubError(f"timm has no weights {tag!r} for {architecture!r}; {known}") from None
    if cfg is None:
        raise HubError(f"timm says nothing about the images that {name!r} takes; choose another")
    full = PREFIX + (f"{architecture}.{cfg.tag}" if cfg.tag else architecture)
    return _model(full, cfg, partial(_make, full.removeprefix(PREFIX)), _weights(full, cfg))


def _present_name(name: str) -> str:
    """The name that timm itself puts in the place of a deprecated one; a tag given stays."""
    architecture, _, tag = name.partition(".")
    # Where a version of timm has no such list, its old names are names that it does not know.
    renamed = getattr(timm.models, "get_deprecated_models", dict)()
    if architecture not in renamed:
        return name
    present = renamed[architecture]
    if present is None:
        raise HubError(f"timm has removed {name!r}; {closest(PREFIX + name)}")
    present = f"{present.partition('.')[0]}.{tag}" if tag else present
    _warn_renamed(name, present)
    return present


@cache  # once: a hub's names are looked up more than once on the way to a model
def _warn_renamed(name: str, present: str) -> None:
    warnings.warn(
        f"timm has renamed {PREFIX}{name} to {PREFIX}{present}, which is taken", stacklevel=4
    )


def find_folder(path: Path) -> HubModel:
    """A folder as ``timm.models.save_for_hf`` writes it: ``config.json`` beside the weights.

    Raises HubError if the folder, the configuration or timm's model is missing; the weights are
    looked for when they are wanted.
    """
    name = FOLDER_PREFIX + str(path)
    if not (path / CONFIG).is_file():
        raise HubError(
            f"{name}: no {CONFIG} in {path}; expected the folder to hold {CONFIG} and {SAFE} or "
            f"{PICKLED}, as timm.models.save_for_hf writes them"
        )
    files = [path / file for file in (SAFE, PICKLED)]
    weights = next((file for file in files if file.is_file()), None)
    if weights is None:  # another name, or several parts
        weights = path if any(path.glob("*" + INDEX_ENDING)) else files[0]
    return _saved(name, path / CONFIG, WeightSource(name, path=weights))


def find_repository(repository: str) -> HubModel:
    """ "USER/NAME[@REVISION]": a model of timm's own there, or what its ``config.json`` describes,
    which is downloaded if it is not in the cache.

    Raises HubError if it cannot be had or is none of timm's.
    """
    identifier, _, revision = repository.partition("@")
    owner, _, name = identifier.partition("/")
    if not name or "/" in name:
        raise HubError(f"{REPOSITORY_PREFIX}{repository}: expected {REPOSITORY_PREFIX}USER/NAME")
    if owner == PREFIX.rstrip("/") and timm.is_model(name):
        model = find(name)
        if not revision or model.weights is None:
            return model
        weights = dataclasses.replace(model.weights, revision=revision)
        return dataclasses.replace(model, name=f"{model.name}@{revision}", weights=weights)
    full = REPOSITORY_PREFIX + repository
    revision = revision or None
    try:
        config = fetch_config(WeightSource(full, identifier, (CONFIG,), revision))
    except HubError as error:
        if owner != PREFIX.rstrip("/"):
            raise
        raise HubError(
            f"{error}. timm itself has no model {name!r}; {closest(PREFIX + name)}"
        ) from error
    return _saved(full, config, WeightSource(full, identifier, revision=revision))


def _saved(name: str, config: Path, weights: WeightSource) -> HubModel:
    """What a ``config.json`` as timm writes it describes."""
    return described(name, config.read_text(encoding="utf-8"), weights, config)


def described(
    name: str, text: str, weights: WeightSource | None, config: Path | str = CONFIG
) -> HubModel:
    """What the text of a ``config.json`` as timm writes it describes; HubError where that is none
    of timm's networks. config: where it was found, for messages."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise HubError(f"{name}: {config} is no JSON ({error})") from error
    content = content if isinstance(content, dict) else {}
    architecture = content.get("architecture")
    if architecture is None:
        other = content.get("model_type") or content.get("library_name")
        kind = f"; it describes a {other!r} of another library" if other else ""
        raise HubError(
            f"{name}: {config} names no 'architecture' of timm{kind}. Expected a model as "
            "timm.models.save_for_hf writes it; of other files, name the weights as "
            "file/PATH?arch=NAME"
        )
    if isinstance(architecture, str):
        architecture = _present_name(architecture)
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        hint = closest(PREFIX + architecture) if isinstance(architecture, str) else "it is no name"
        raise HubError(
            f"{name}: timm has no architecture {architecture!r}, which {config} names; {hint}"
        )
    known = set(PretrainedCfg.__dataclass_fields__)
    settings = content.get("pretrained_cfg") or content
    cfg = PretrainedCfg(**{key: value for key, value in settings.items() if key in known})
    # What it was built with, such as a width; the number of classes is the new task's.
    model_args = {**(content.get("model_args") or {})}
    model_args.pop("num_classes", None)
    make = partial(_make, architecture, **model_args)
    model = _model(name, cfg, make, weights, filters=False)
    return dataclasses.replace(model, config=text)


def _model(name: str, cfg, make, weights: WeightSource | None, filters: bool = True) -> HubModel:
    channels, height, width = cfg.input_size
    if channels != 3 or height != width:
        raise HubError(
            f"{name} takes images {list(cfg.input_size)}; experts take square RGB images"
        )
    return HubModel(
        name=name,
        native_size=height,
        fixed_size=cfg.fixed_input_size,
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        interpolation=cfg.interpolation,
        make=make,
        weights=weights,
        convert=partial(_pretrained, name.removeprefix(PREFIX)) if filters else None,
    )


def _make(name: str, num_outputs: int, **model_args) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=num_outputs, **model_args)


def _weights(name: str, cfg) -> WeightSource | None:
    if cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        if cfg.hf_hub_filename:
            stem = cfg.hf_hub_filename.rpartition(".")[0]
            # The same files, in the order that timm itself tries them.
            safe = SAFE if cfg.hf_hub_filename == PICKLED else f"{stem}.safetensors"
            filenames = tuple(dict.fromkeys((safe, cfg.hf_hub_filename)))
        else:
            filenames = (SAFE, PICKLED)
        return WeightSource(name, repository, filenames, revision or None)
    if cfg.url:
        return WeightSource(name, url=cfg.url if isinstance(cfg.url, str) else cfg.url[0])
    return None


def _pretrained(name: str, state: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """The file's tensors under timm's present names, checked against the whole original network.

    timm renames the tensors of old files as it loads them, and is strict only if the number of
    classes stays: hence the network with its original head, from which the body is then taken.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # new heads are drawn alike, loaded or not
            original = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)}
            )
    except (RuntimeError, KeyError) as error:
        raise HubError(
            f"the weights of {source} are not those of {PREFIX}{name}: {error}"
        ) from error
    return original.state_dict()
