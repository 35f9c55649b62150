"""Trained heads that a hub starts with, and the router and aggregator they were trained with.

    experts.I.weight [C, D_I], experts.I.bias [C]   a linear head on the pooled features of expert I
    generator.NAME, aggregator.NAME                 as these parts' state dicts call them, or absent

Beside it, in ``STEM.images.csv.gz``, is the list of the images that chose and trained these parts,
with their splits (``data.kept``), where they are files: a run begins with that split, since images
that were added later would draw another, and what chose the experts must not be trained on.

``hubpath shelf unfreeze`` writes such files, of a hub whose bodies stood still, and ``start=FILE``
of a run begins with it in place of new parts: before the first step every expert says what it said
there. All of a file is compared with the hub before any of it is copied. Letters: M experts, C
classes, D features of an expert.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoints.tensor_file import replace_file
from ..data.kept import FileList
from ..hub.weights import file_digest
from ..model import HubPathway
from ..model.heads import head_layers

KIND = "hubpath start"
NETWORK = "network."  # of a router on a frozen network: it comes with its own weights
REMEDY = "take the command that was written beside it"


def absolute(path: str | os.PathLike) -> str:
    """The path as a run keeps it, which may go on from another folder."""
    return os.path.abspath(path)


def linear_head(expert: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """The one layer that an expert's outputs are linear in, [C, D] or a convolution of one pixel;
    None: its head is another one."""
    found = head_layers(expert)
    if len(found) != 1 or getattr(found[0], "bias", None) is None:
        return None
    [layer] = found
    pixel = isinstance(layer, nn.Conv2d) and layer.weight.shape[2:] == (1, 1)
    plain = pixel and layer.groups == 1
    return layer if isinstance(layer, nn.Linear) or plain else None


@dataclass(frozen=True, eq=False)
class Start:
    """What a hub starts with.

    classes: their names. experts: M names, for messages. heads: of each expert weight [C, D] and
    bias [C]. generator, aggregator: state dicts of these parts; empty: they start anew. source: the
    file, for messages. images: the list of the images that it was made with; None: these are no
    files.
    """

    classes: tuple[str, ...]
    experts: tuple[str, ...]
    heads: tuple[tuple[Tensor, Tensor], ...]
    generator: Mapping[str, Tensor]
    aggregator: Mapping[str, Tensor]
    source: str = ""
    images: FileList | None = None

    def describe(self) -> str:
        """What begins as it was trained, in words."""
        parts = {"router": self.generator, "aggregator": self.aggregator}
        names = ["heads", *(name for name, given in parts.items() if given)]
        return f"trained {', '.join(names)} of {self.source}"

    def write(self, path: Path) -> None:
        """As a whole file, in float32, and before it the list. Raises OSError."""
        tensors = {}
        for i, (weight, bias) in enumerate(self.heads):
            tensors |= {f"experts.{i}.weight": weight.float(), f"experts.{i}.bias": bias.float()}
        tensors |= {f"generator.{name}": tensor for name, tensor in self.generator.items()}
        tensors |= {f"aggregator.{name}": tensor for name, tensor in self.aggregator.items()}
        told = {"kind": KIND, "classes": self.classes, "experts": self.experts, "images": None}
        if self.images is not None:
            self.images.write(list_beside(path))
            told["images"] = file_digest(list_beside(path), "sha256")
        replace_file(path, tensors, {"start": json.dumps(told)})

    @classmethod
    def read(cls, path: str | Path) -> Start:
        """Raises ValueError for a file that is missing, damaged or none of ``write``, or whose list
        is gone or another one."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"start: there is no file {path}; write one with `hubpath shelf unfreeze`"
            )
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads(file.metadata()["start"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if told["kind"] != KIND:
                raise ValueError(f"it is a {told['kind']!r}")
            names = [tuple(map(str, told[name])) for name in ("classes", "experts")]
            listed = told.get("images")
            heads = tuple(
                (tensors.pop(f"experts.{i}.weight"), tensors.pop(f"experts.{i}.bias"))
                for i in range(len(names[1]))
            )
            parts = [_part(tensors, name) for name in ("generator", "aggregator")]
            if tensors:
                raise ValueError(f"{min(tensors)} is of no part of a hub")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"start: {path} holds no trained heads ({error}); write them with `hubpath shelf "
                "unfreeze`"
            ) from error
        return cls(*names, heads, *parts, str(path), _list_of(path, listed))

    def check(self, classes: Sequence[str], num_experts: int) -> None:
        """Raises ValueError unless it is for these classes, in this order, and that many experts.
        To be asked before a hub is built."""
        if len(self.classes) != len(classes):
            raise ValueError(
                f"start: expected heads of the {len(classes)} classes of the data, got "
                f"{len(self.classes)} in {self.source}; {REMEDY}"
            )
        if self.classes != tuple(classes):
            i = next(i for i, name in enumerate(classes) if name != self.classes[i])
            raise ValueError(
                f"start: expected heads of the classes of the data, got others in {self.source} "
                f"(number {i} is {self.classes[i]!r} there, {classes[i]!r} here); {REMEDY}"
            )
        if len(self.experts) != num_experts:
            raise ValueError(
                f"start: expected heads of the hub's {num_experts} experts, got "
                f"{len(self.experts)} in {self.source}, of {', '.join(self.experts)}; {REMEDY}"
            )

    @torch.no_grad()
    def load_into(self, model: HubPathway) -> None:
        """Copies everything into a hub, which ``check`` was for. Of experts on the meta device,
        which another process has, shapes are compared alone.

        Raises ValueError, and leaves the model as it was, where a head, the router or the
        aggregator is of another kind or shape.
        """
        pairs = [
            *self._heads(model.experts),
            *self._of_part("router", model.generator, self.generator),
            *self._of_part("aggregator", model.aggregator, self.aggregator),
        ]
        for own, given in pairs:
            if not own.is_meta:
                own.copy_(given.reshape(own.shape))

    def _heads(self, experts: Sequence[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
        for i, (name, expert) in enumerate(zip(self.experts, experts, strict=True)):
            layer, (weight, bias) = linear_head(expert), self.heads[i]
            if layer is None:
                raise ValueError(
                    f"start: expected experts whose head is one linear layer with a bias, and "
                    f"expert {i} ({name}) has another; leave start out, or that expert"
                )
            own = list(layer.weight.shape[:2])
            if own != list(weight.shape) or own[:1] != list(bias.shape):
                raise ValueError(
                    f"start: the head of expert {i} is {own} here, and {list(weight.shape)} in "
                    f"{self.source} ({name}); {REMEDY}"
                )
            yield from ((layer.weight, weight), (layer.bias, bias))

    def _of_part(
        self, part: str, module: nn.Module, given: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if not given:
            return
        own = {name: t for name, t in module.state_dict().items() if not name.startswith(NETWORK)}
        shapes = [
            {name: list(tensor.shape) for name, tensor in state.items()} for state in (given, own)
        ]
        wrong = next((n for n in {**own, **given} if shapes[0].get(n) != shapes[1].get(n)), None)
        if wrong is not None:
            there, here = (state.get(wrong, "absent") for state in shapes)
            raise ValueError(
                f"start: the {part} of {self.source} is not as this hub's ({wrong}: {there} there, "
                f"{here} here); {REMEDY}"
            )
        yield from ((own[name], given[name]) for name in given)


def list_beside(path: str | Path) -> Path:
    """Where the list of a file's images is."""
    return Path(path).with_suffix(".images.csv.gz")


def _list_of(path: Path, digest: str | None) -> FileList | None:
    if digest is None:
        return None
    beside = list_beside(path)
    found = file_digest(beside, "sha256") if beside.is_file() else None
    if found != digest:
        what = "is gone" if found is None else "is another one than it was written with"
        raise ValueError(
            f"start: {beside}, the list of the images of {path.name}, {what}; put it back, or "
            "write both with `hubpath shelf unfreeze`"
        )
    return FileList.read(beside)


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Takes out what belongs to a part, under its own names."""
    names = [name for name in tensors if name.startswith(f"{part}.")]
    return {name.removeprefix(f"{part}."): tensors.pop(name) for name in names}
