"""Experts by timm's names: looking them up, asking what they accept, building them.

A model is asked whether it takes an input size by running it on torch's meta device, which computes
shapes only: no weights, no pixels, a tenth of a second.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from .errors import HubError
from .expert import Expert, Resized, load_body
from .weights import PICKLED, SAFE, WeightSource, read_state_dict

PREFIX = "timm/"

# Sides, in pixels, that a refusal offers instead: those that networks are commonly trained at.
COMMON_SIZES = (32, 48, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)


@dataclass(frozen=True)
class TimmModel:
    """A model that timm knows.

    name: as timm spells it, with the tag of the weights if it has any. native_size: pixels a side.
    fixed_size: timm says that it was built for the native size alone. weights: where they are;
    None: nowhere.
    """

    name: str
    native_size: int
    fixed_size: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    weights: WeightSource | None

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def find(name: str) -> TimmModel:
    """Looks a model up by timm's name, without the "timm/"; HubError where there is none."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise HubError([f"timm has no model {name!r}; {_closest(name)}"])
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:  # the architecture exists, the tag does not
        tags = [full for full in _names() if full.partition(".")[0] == architecture and "." in full]
        known = f"it has {', '.join(tags)}" if tags else "it has no pre-trained weights"
        raise HubError([f"timm has no weights {tag!r} for {architecture!r}; {known}"]) from None
    if cfg is None:
        raise HubError([f"timm says nothing about the images that {name!r} takes; choose another"])
    channels, height, width = cfg.input_size
    if channels != 3 or height != width:
        raise HubError(
            [f"{PREFIX}{name} takes images {list(cfg.input_size)}; experts take square RGB images"]
        )
    full = f"{architecture}.{cfg.tag}" if cfg.tag else architecture
    return TimmModel(
        name=full,
        native_size=height,
        fixed_size=cfg.fixed_input_size,
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        interpolation=cfg.interpolation,
        weights=_weights(full, cfg),
    )


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
        return WeightSource(PREFIX + name, repository, filenames, revision or None)
    if cfg.url:
        url = cfg.url if isinstance(cfg.url, str) else cfg.url[0]
        return WeightSource(PREFIX + name, None, url=url)
    return None


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    return (*timm.list_models(), *timm.list_pretrained())


def _closest(name: str) -> str:
    close = difflib.get_close_matches(name, _names(), n=3, cutoff=0.6)
    if not close:
        return 'timm.list_models("*WORD*") lists the names that hold a word'
    return f"did you mean {' or '.join(close)}?"


def refusal(model: TimmModel, num_outputs: int, size: int) -> str | None:
    """Why the model does not map images [n, 3, size, size] to [n, num_outputs]; None: it does."""
    return _refusal(_skeleton(model.name, num_outputs), num_outputs, size)


def accepted_sizes(model: TimmModel, num_outputs: int) -> list[int]:
    """The common sides in pixels, and the native one, that the model takes, in ascending order."""
    skeleton = _skeleton(model.name, num_outputs)
    sizes = sorted({*COMMON_SIZES, model.native_size})
    return [size for size in sizes if _refusal(skeleton, num_outputs, size) is None]


@lru_cache(maxsize=16)  # a hub often holds an architecture more than once
def _skeleton(name: str, num_outputs: int) -> nn.Module:
    """The network's shapes, without weights."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=num_outputs).eval()


@torch.no_grad()
def _refusal(skeleton: nn.Module, num_outputs: int, size: int) -> str | None:
    try:
        output = skeleton(torch.empty(1, 3, size, size, device="meta"))
    except Exception as error:  # each architecture has its own way to refuse
        return str(error) or type(error).__name__
    if not isinstance(output, torch.Tensor) or output.shape != (1, num_outputs):
        return f"it has no classifier that gives {num_outputs} outputs an image"
    return None


def build(model: TimmModel, num_outputs: int, input_size: int, size: int, weights=None) -> Expert:
    """The expert: built, loaded if ``weights`` (a path) is given, and resizing if it must.

    input_size: pixels a side of the images of the hub. size: the side that the network works at.
    """
    body = timm.create_model(model.name, pretrained=False, num_classes=num_outputs)
    if weights is not None:
        load_body(body, _pretrained(model, weights), source=str(weights))
    module = body if size == input_size else Resized(body, size, model.interpolation)
    return Expert(
        name=model.full_name,
        module=module,
        mean=model.mean,
        std=model.std,
        native_size=model.native_size,
        size=size,
        fixed_size=model.fixed_size,
    )


def _pretrained(model: TimmModel, path) -> dict[str, torch.Tensor]:
    """The file's tensors under timm's present names, checked against the whole original network.

    timm renames the tensors of old files as it loads them, and is strict only if the number of
    classes stays: hence the network with its original head, from which the body is then taken.
    """
    overlay = {"state_dict": read_state_dict(path)}
    try:
        original = timm.create_model(model.name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        raise HubError(
            [f"the weights of {path} are not those of {model.full_name}: {error}"]
        ) from error
    return original.state_dict()
