"""Linear heads on the features of a shelf's models, kept beside them.

    SHELF/heads/KEY-FIT.safetensors   "weight" [C, D], "bias" [C], "out_of_fold" float16 [n, C]

KEY is the model's, which its features are known by, and FIT a hash of the training images' classes
and what else the fit depends on, so a head is fitted once, never taken for another's, and goes when
its features have gone. They are fitted on the training images as evaluation
sees them (view 0); all models' cross-validation leaves out the same images together. How they are
fitted is ``logistic``.

Letters: M models, n images, D features, C classes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.tensor_file import replace_file
from ..devices import threads_for
from ..features import Shelf
from ..runs.answers import check_memory
from . import logistic
from .logistic import fit_logistic, folds_of
from .scores import check_images

HEADS = "heads"  # the folder of their files
FORMAT = 1

Tell = Callable[[str], None]


@dataclass(frozen=True)
class FittedHead:
    """A linear head on a model's features.

    weight: float32 [C, D]. bias: float32 [C]. decay: of the weights on standardised features, as
    cross-validation chose it. accuracy, loss: cross-validated on the training images, the latter
    in nats. seconds: that fitting took. out_of_fold: float16 [n, C], logits of the training images
    by heads that were fitted without them, the largest 0.
    """

    weight: Tensor
    bias: Tensor
    decay: float
    accuracy: float
    loss: float
    seconds: float
    out_of_fold: Tensor


def fit_heads(
    shelf: Shelf,
    models: Sequence[int] | None = None,
    seed: int = 0,
    tell: Tell = lambda text: None,
) -> list[FittedHead]:
    """A head on the features of each model, read where there is one, else fitted and kept.

    Args:
        shelf: what is fitted to its training images.
        models: numbers of models; None: all.
        seed: of the folds of cross-validation.
        tell: is told which head is fitted next.

    Raises:
        ValueError: fewer training images than classes; features that are not finite.
        OSError: a head cannot be written.
    """
    models = range(len(shelf.models)) if models is None else models
    train = shelf.splits["train"]
    targets, num_classes = shelf.targets[train], len(shelf.classes)
    check_images(targets, num_classes)
    folds = folds_of(targets, seed)
    found = []
    for done, i in enumerate(models):
        path = shelf.folder / HEADS / f"{_name(shelf, i, targets, seed)}.safetensors"
        shape = (num_classes, shelf.models[i].num_features, len(train))
        head = _read(path, *shape)
        if head is None:
            tell(f"head {done + 1} of {len(models)}: {shelf.models[i].label}")
            head = _fit(shelf, i, train, folds)
            _write(path, head)
        found.append(head)
    return found


def outputs(
    shelf: Shelf, heads: Sequence[FittedHead], numbers: Tensor, models: Sequence[int]
) -> Tensor:
    """What heads say of images, as evaluation sees them: float32 [M, n, C].

    heads: of ``models``, one each. numbers: int64 [n], of images. Raises ValueError where memory
    does not suffice.
    """
    _check_memory(shelf, heads, len(numbers))
    found = torch.empty(len(heads), len(numbers), len(shelf.classes))
    for out, head, i in zip(found, heads, models, strict=True):
        features = shelf.features(i)[0][numbers].float()
        torch.addmm(head.bias, features, head.weight.mT, out=out)
    return found


def held_out(
    shelf: Shelf, heads: Sequence[FittedHead], models: Sequence[int]
) -> tuple[Tensor, Tensor, str]:
    """What heads say of images that they were not fitted to: logits float32 [M, n, C], their
    classes int64 [n], and which these are: "validation"; or, where there is none, "train", of
    which each image's logits are by a head that was fitted without it. Raises ValueError where
    memory does not suffice."""
    numbers = shelf.splits["validation"]
    if len(numbers):
        return outputs(shelf, heads, numbers, models), shelf.targets[numbers], "validation"
    _check_memory(shelf, heads, len(shelf.splits["train"]))
    logits = torch.stack([head.out_of_fold for head in heads]).float()
    return logits, shelf.targets[shelf.splits["train"]], "train"


def _check_memory(shelf: Shelf, heads: Sequence[FittedHead], images: int) -> None:
    bytes_each = len(heads) * len(shelf.classes) * torch.float32.itemsize
    check_memory(bytes_each, images, f"extract a shelf of fewer than {len(heads)} models")


def remove_strays(shelf: Shelf) -> None:
    """Deletes the heads of features that are not on the shelf any more.

    shelf: with all models whose files are there, so opened with ``models=False``.
    """
    keys = {model.key for model in shelf.models}
    for path in (shelf.folder / HEADS).glob("*.safetensors"):
        if path.stem.partition("-")[0] not in keys:
            path.unlink(missing_ok=True)


def _name(shelf: Shelf, index: int, targets: Tensor, seed: int) -> str:
    key = shelf.models[index].key
    depends = [
        FORMAT, key, len(shelf.classes), seed,
        logistic.FOLDS, logistic.DECAYS, logistic.TOLERANCE,
    ]  # fmt: skip
    found = hashlib.sha256(json.dumps(depends).encode())
    found.update(targets.numpy().tobytes())
    return f"{key}-{found.hexdigest()[:24]}"


def _fit(shelf: Shelf, index: int, train: Tensor, folds: Tensor) -> FittedHead:
    began = time.perf_counter()
    features, classes = shelf.features(index)[0][train], len(shelf.classes)
    try:
        with threads_for(features.numel() * classes * logistic.FOLDS):
            fitted = fit_logistic(features, shelf.targets[train], classes, folds)
    except ValueError as error:
        raise ValueError(f"{shelf.models[index].label}: {error}") from error
    logits = fitted.out_of_fold - fitted.out_of_fold.amax(1, keepdim=True)
    return FittedHead(
        fitted.weight,
        fitted.bias,
        fitted.decay,
        fitted.accuracy,
        fitted.loss,
        time.perf_counter() - began,
        logits.clamp_min(torch.finfo(torch.float16).min).half(),
    )


def _write(path: Path, head: FittedHead) -> None:
    about = {name: getattr(head, name) for name in ("decay", "accuracy", "loss", "seconds")}
    tensors = {"weight": head.weight, "bias": head.bias, "out_of_fold": head.out_of_fold}
    replace_file(path, tensors, {"head": json.dumps(about)})


def _read(path: Path, num_classes: int, width: int, images: int) -> FittedHead | None:
    """A head that was kept; None where there is none, or the file is damaged: it is fitted anew."""
    expected = {
        "weight": ((num_classes, width), torch.float32),
        "bias": ((num_classes,), torch.float32),
        "out_of_fold": ((images, num_classes), torch.float16),
    }
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["head"])
            tensors = {name: file.get_tensor(name) for name in expected}
            head = FittedHead(**tensors, **about)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    fits = all((tuple(tensors[n].shape), tensors[n].dtype) == e for n, e in expected.items())
    return head if fits else None
