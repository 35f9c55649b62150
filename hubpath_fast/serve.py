"""Runs a hub that was exported in parts: the router and each expert as a package of its own.

This file needs torch and nothing else. `hubpath export --format parts` puts a copy of it into the
folder that it writes, so a service needs that folder alone:

    from serve import Parts
    probabilities = Parts("FOLDER")(images)  # uint8 [N, 3, S, S] -> [N, C]

The router says which K experts each image goes to; on the host the images are sorted by expert,
each expert that somebody wants runs once on its own images, and the aggregator joins what they say.
So any batch costs exactly N*K forwards, whatever torch.export can or cannot say in one program.

A folder: ``parts.json`` (what the package is, and of each part its file, bytes and SHA-256),
``router.pt2``, ``experts/NN-LABEL.pt2``, ``aggregator.pt2``. Shapes: N images, M experts, K active
ones, C outputs, S pixels a side.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 1
INDEX = "parts.json"


class PartsError(ValueError):
    """A folder that is not whole or not readable here, or images that the package does not take."""


class Parts:
    """A hub in parts, ready to run.

    about: what the package says of itself, such as "classes", "forwards" and "proof". Every file is
    compared with what the package says of it before anything of it is loaded.

    Args:
        folder: that `hubpath export --format parts` wrote.
        device: to run on; None: the one that it was exported for.

    Raises:
        PartsError: no such folder, a part that is missing, cut short or another one, a package of a
            newer torch; a device that is not here.
    """

    def __init__(self, folder: str | Path, device: str | None = None):
        self.folder = Path(folder)
        self.about = _read_index(self.folder)
        self.device = _device(device or self.about["device"])
        self.router = self._load(self.about["router"])
        self.experts = [entry and self._load(entry) for entry in self.about["experts"]]
        self.aggregator = self._load(self.about["aggregator"])

    @torch.no_grad()
    def __call__(self, images: Tensor, routing: bool = False) -> Any:
        """What the hub says of images.

        Args:
            images: uint8 [N, 3, S, S], on any device.
            routing: whether to return experts and weights, too.

        Returns:
            Probabilities [N, C], or, where the package says "outputs", what the model predicts
            [N, C, ...]. With ``routing`` also experts int64 [N, K] and weights [N, K]; an image
            that needs fewer than K names its first again, with the weight 0.

        Raises:
            PartsError: images of another type or shape.
        """
        images = self._checked(images).to(self.device)
        # Each part's ``forward``: in a call of the part torch would check its input again, which
        # takes as long as a layer or two; images are checked here.
        experts, weights = self.router.forward(images)
        answer = self.aggregator.forward(self._concatenated(images, experts, weights))
        return (answer, experts, weights) if routing else answer

    @torch.no_grad()
    def ask(self, index: int, images: Tensor) -> Tensor:
        """What expert ``index`` says of images uint8 [n, 3, S, S], on any device: [n, C, ...].

        Raises:
            PartsError: images of another type or shape, no such expert, or one that is no part of
                the package since fixed routes never ask it.
        """
        kept = [i for i, expert in enumerate(self.experts) if expert is not None]
        if type(index) is not int or index not in kept:
            raise PartsError(f"index: expected the number of an expert, {kept}, got {index!r}")
        return self._ask(index, self._checked(images).to(self.device))

    def _ask(self, index: int, images: Tensor) -> Tensor:
        return self.experts[index].forward(images)

    def _concatenated(self, images: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted outputs side by side [N, M*C, ...], zeros where an expert was not asked."""
        concat, count = None, len(images)
        for index, samples, slots in _groups(experts.tolist(), weights.tolist()):
            whole = len(samples) == count
            own = self._ask(index, images if whole else images[samples])
            if concat is None:
                concat = own.new_zeros(count, len(self.experts), *own.shape[1:])
            weight = weights[samples, slots].view(-1, *[1] * (own.dim() - 1))
            concat[slice(None) if whole else samples, index] = (own * weight).to(own.dtype)
        return concat.flatten(1, 2)

    def _checked(self, images: Tensor) -> Tensor:
        dtype, (_, *shape) = self.about["input"]
        fits = isinstance(images, Tensor) and images.dtype == torch.uint8
        if not fits or list(images.shape[1:]) != shape or len(images) == 0:
            got = type(images).__name__
            if isinstance(images, Tensor):
                got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            wanted = ", ".join(map(str, ["N", *shape]))
            raise PartsError(
                f"images: expected {dtype} [{wanted}] with N >= 1, got {got}; resize and crop them "
                "to that, with values 0 to 255"
            )
        return images

    def _load(self, entry: dict[str, Any]) -> Any:
        """The part, as something to call."""
        path = self.folder / entry["file"]
        _check_file(path, entry)
        try:
            program = torch.export.load(path)
            if self.device != torch.device(self.about["device"]):
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, str(self.device))
            checks = "check_guards" in inspect.signature(program.module).parameters
            return program.module(**({"check_guards": False} if checks else {}))
        except Exception as error:  # torch has many ways to fail here
            first = str(error).strip().partition("\n")[0]
            made = self.about["versions"]["torch"]
            raise PartsError(
                f"{path} was made by torch {made} and cannot be loaded by torch "
                f"{torch.__version__} ({type(error).__name__}: {first}); export again with this one"
            ) from error


def _groups(
    experts: list[list[int]], weights: list[list[float]]
) -> list[tuple[int, list[int], list[int]]]:
    """(expert, its samples, the slots where they name it), of experts that have samples; in order.

    A slot with the weight 0 behind the first only repeats that one's expert. In plain Python: a few
    numbers are sorted faster than torch starts to.
    """
    found: dict[int, tuple[list[int], list[int]]] = {}
    for sample, (own, shares) in enumerate(zip(experts, weights)):  # noqa: B905
        for slot, (index, share) in enumerate(zip(own, shares)):  # noqa: B905
            if share > 0 or slot == 0:
                samples, slots = found.setdefault(index, ([], []))
                samples.append(sample)
                slots.append(slot)
    return [(index, *found[index]) for index in sorted(found)]


def _read_index(folder: Path) -> dict[str, Any]:
    """What the package says of itself."""
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        made = about["versions"]["torch"]
        newer = torch_numbers(made) > torch_numbers(torch.__version__)
        _check_index(about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartsError(
            f"{folder}: expected a folder that `hubpath export --format parts` wrote, with its "
            f"{INDEX}; it cannot be read ({type(error).__name__}: {error})"
        ) from None
    if about["parts"] > VERSION:
        raise PartsError(
            f"{folder}: it is of version {about['parts']}, this file reads up to {VERSION}; use "
            "the serve.py that lies in the folder"
        )
    if newer:
        raise PartsError(
            f"{folder} was made by torch {made}, here is torch {torch.__version__}, which may not "
            "load it; update torch, or export again with this one"
        )
    return about


def _check_index(about: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where something that is used is not there."""
    if type(about["parts"]) is not int or not isinstance(about["device"], str):
        raise TypeError("parts or device is of another type")
    if about["parts"] > VERSION:
        return  # what it has is not known here
    dtype, (_, *shape) = about["input"]
    if dtype != "uint8" or len(shape) != 3 or any(type(side) is not int for side in shape):
        raise ValueError("input is no shape of images")
    experts = about["experts"]
    if not isinstance(experts, list) or not any(experts):
        raise TypeError("experts is no list of parts")
    kept = [entry for entry in experts if entry is not None]
    for entry in (about["router"], about["aggregator"], *kept):
        found = entry["file"], entry["bytes"], entry["sha256"]
        if [type(value) for value in found] != [str, int, str]:
            raise TypeError("a part's file, bytes or sha256 is of another type")


def _device(name: str) -> torch.device:
    """The device. PartsError: it is not here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device has its own way to be missing
        first = str(error).strip().partition("\n")[0]
        raise PartsError(
            f"device: expected one that torch has on this machine, such as cpu, got {name} "
            f"({first})"
        ) from None
    return device


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    """Raises PartsError unless the file is there and is the one that was exported."""
    if not path.is_file():
        raise PartsError(f"{path} is missing; copy the whole folder again, or export again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise PartsError(
            f"{path} has {size} bytes, and was exported with {entry['bytes']}; copy it again"
        )
    if file_hash(path) != entry["sha256"]:
        raise PartsError(
            f"{path} is not the file that was exported (its SHA-256 is another); copy it again"
        )


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def torch_numbers(version: str) -> tuple[int, ...]:
    """(2, 14) of "2.14.1+cpu": the format of a package changes with these."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
