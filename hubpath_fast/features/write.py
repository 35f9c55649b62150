"""Writing the files of a shelf; and a whole shelf from features that are there already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.tensor_file import replace_file
from ..data.kept import FileList
from ..files import write_json
from .shelf import (
    DTYPES,
    FEATURES,
    IMAGES,
    RECORD,
    ROUTER,
    SPLITS,
    TARGETS,
    Shelf,
    ShelfModel,
    ShelfRecord,
    digest_of,
)

KEY = re.compile("[0-9a-f]{24}")


def write_record(folder: Path, record: ShelfRecord) -> None:
    write_json(folder / RECORD, record.to_dict())


def write_images(folder: Path, images: FileList | None, targets: Tensor) -> None:
    """The list of a shelf's images, where they are files, and their classes [n]."""
    if images is not None:
        images.write(folder / IMAGES)
    replace_file(folder / TARGETS, {"targets": targets.to(torch.int64)})


def write_pixels(folder: Path, pixels: Tensor) -> None:
    """pixels: uint8 [V, n, 3, s, s]."""
    replace_file(folder / ROUTER, {"pixels": pixels})


def write_model(
    folder: Path,
    model: ShelfModel,
    features: Tensor,
    source_head: tuple[Tensor, Tensor] | None = None,
) -> Path:
    """A model's file, which is whole or absent. features: [V, n, D], of the shelf's dtype.
    source_head: weight [S, D] and bias [S]. Raises OSError."""
    tensors = {"features": features}
    if source_head is not None:
        weight, bias = source_head
        tensors |= {"source_weight": weight.float(), "source_bias": bias.float()}
    path = folder / FEATURES / f"{model.key}.safetensors"
    replace_file(path, tensors, {"model": json.dumps(dataclasses.asdict(model))})
    return path


def remove_features(folder: Path, but: Collection[str] = ()) -> None:
    """Deletes the models' files, but those of some keys. Files of other names are not of a shelf
    and stay."""
    for path in (folder / FEATURES).glob("*.safetensors"):
        if KEY.fullmatch(path.stem) and path.stem not in but:
            path.unlink()


def write_shelf(
    folder: str | Path,
    features: Mapping[str, Tensor],
    targets: Tensor,
    classes: Sequence[str],
    sizes: Mapping[str, int],
    pixels: Tensor | None = None,
    source_heads: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    about: Mapping[str, Mapping[str, Any]] | None = None,
) -> Shelf:
    """A shelf of features of your own.

    Args:
        folder: new, or without a shelf.
        features: of each model, by its label, [V, n, D] or, of a single view, [n, D]; all float16
            or all float32. Images are in the order train, validation, test.
        targets: int64 [n], classes by number. classes: their names.
        sizes: images of "train", and perhaps of "validation" and "test"; n in all.
        pixels: uint8 [V, n, 3, s, s] or [n, 3, s, s], what a router on the image looks at.
        source_heads: of models, by label, (weight [S, D], bias [S]) of the head that they were
            pre-trained with, on these features.
        about: of models, by label, further fields of ``ShelfModel``, such as ``ms``.

    Raises:
        ValueError: a folder that holds a shelf; no models; features of mixed dtypes or shapes, or
            that are not finite; targets, sizes or pixels that do not fit them.
    """
    folder, sources, about = Path(folder), source_heads or {}, about or {}
    if (folder / RECORD).exists():
        raise ValueError(f"folder: {folder} holds a shelf already; give a new folder")
    given = {label: t if t.dim() == 3 else t[None] for label, t in features.items()}
    dtype, views = _check_features(given, targets, sizes)
    if not 0 <= targets.min() <= targets.max() < len(classes):
        raise ValueError(
            f"targets: expected numbers of the {len(classes)} classes, 0..{len(classes) - 1}, got "
            f"{targets.min().item()}..{targets.max().item()}"
        )
    if pixels is not None:
        pixels = pixels if pixels.dim() == 5 else pixels[None]
        _check_pixels(pixels, views, len(targets))
    counts = tuple(sizes.get(split, 0) for split in SPLITS)
    record = ShelfRecord(
        tuple(classes),
        counts,
        dtype,
        views,
        digest_of(None, targets, counts, classes),
        router_size=None if pixels is None else pixels.shape[-1],
        test_is_validation=not sizes.get("test", 0),
    )
    remove_features(folder)  # of an attempt that was killed before it was a shelf
    write_images(folder, None, targets)
    if pixels is not None:
        write_pixels(folder, pixels)
    for position, (label, tensor) in enumerate(given.items()):
        told = {"name": label, "weights": "", **about.get(label, {})}
        source = sources.get(label)
        key = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        key = hashlib.sha256(f"{label} {key} {record.digest}".encode()).hexdigest()[:24]
        model = ShelfModel(
            label=label,
            position=position,
            key=key,
            num_features=tensor.shape[-1],
            source_classes=0 if source is None else len(source[1]),
            **told,
        )
        write_model(folder, model, tensor, source)
    write_record(folder, record)
    return Shelf.open(folder)


def _check_features(
    features: Mapping[str, Tensor], targets: Tensor, sizes: Mapping[str, int]
) -> tuple[str, int]:
    """(dtype, views) of a shelf of these. Raises ValueError."""
    if not features:
        raise ValueError("features: expected at least one model, got none")
    unknown = [split for split in sizes if split not in SPLITS]
    if unknown or not sizes.get("train") or sum(sizes.values()) != len(targets):
        raise ValueError(
            f"sizes: expected images of {', '.join(SPLITS)}, {len(targets)} in all as the targets "
            f"are, some of train, got {dict(sizes)}"
        )
    dtypes = {tensor.dtype for tensor in features.values()}
    names = [name for name, dtype in DTYPES.items() if {dtype} == dtypes]
    if not names:
        raise ValueError(
            "features: expected all of float16 or all of float32, got "
            f"{', '.join(sorted(map(str, dtypes)))}; convert them to one"
        )
    first = next(iter(features.values())).shape[:2]
    for label, tensor in features.items():
        if tensor.dim() != 3 or tensor.shape[:2] != first or first[1] != len(targets):
            raise ValueError(
                f"features of {label}: expected [views, {len(targets)}, D], as many views as the "
                f"others, got {list(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"features of {label}: some are not finite; leave the model out")
    return names[0], first[0]


def _check_pixels(pixels: Tensor, views: int, count: int) -> None:
    shape = pixels.shape
    if pixels.dtype != torch.uint8 or len(shape) != 5 or shape[:3] != (views, count, 3):
        raise ValueError(
            f"pixels: expected uint8 [{views}, {count}, 3, s, s], got {pixels.dtype} {list(shape)}"
        )
    if shape[3] != shape[4]:
        raise ValueError(f"pixels: expected squares, got {shape[3]} x {shape[4]}")
