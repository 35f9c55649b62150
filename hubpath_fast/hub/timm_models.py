"""The source ``timm/``, any of timm's models, and ``local-dir:``, a folder as timm saves one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from .errors import HubError
from .names import closest
from .source import HubModel
from .weights import PICKLED, SAFE, WeightSource

PREFIX, FOLDER_PREFIX = "timm/", "local-dir:"
CONFIG = "config.json"


def find(name: str) -> HubModel:
    """Looks a model up by timm's name, without the "timm/"; HubError where there is none."""
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


def find_folder(folder: str) -> HubModel:
    """A folder as ``timm.models.save_for_hf`` writes it: ``config.json`` beside the weights.

    Raises HubError if the folder, the configuration or timm's model is missing; the weights are
    looked for when they are wanted.
    """
    name, path = FOLDER_PREFIX + folder, Path(folder).expanduser()
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise HubError(
            f"{name}: no {CONFIG} in {path} ({error.strerror}); expected the folder to hold "
            f"{CONFIG} and {SAFE} or {PICKLED}, as timm.models.save_for_hf writes them"
        ) from error
    except ValueError as error:
        raise HubError(f"{name}: {path / CONFIG} is no JSON ({error})") from error
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        hint = closest(PREFIX + architecture) if isinstance(architecture, str) else "it is missing"
        raise HubError(
            f"{name}: timm has no architecture {architecture!r}, which {path / CONFIG} names; "
            f"{hint}"
        )
    known = set(PretrainedCfg.__dataclass_fields__)
    settings = content.get("pretrained_cfg") or content
    cfg = PretrainedCfg(**{key: value for key, value in settings.items() if key in known})
    files = [path / file for file in (SAFE, PICKLED)]
    weights = WeightSource(name, path=next((file for file in files if file.is_file()), files[0]))
    # What it was built with, such as a width; the number of classes is the new task's.
    model_args = {**(content.get("model_args") or {})}
    model_args.pop("num_classes", None)
    make = partial(_make, architecture, **model_args)
    return _model(name, cfg, make, weights, filters=False)


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
