"""The folder of a routed hub, ``SHELF/hub`` by default, and such a hub opened again.

    hub.json                   the shelf, the models that are routed, the classes, the settings
    last/, best/, log.jsonl    of the trainer
    predictions.safetensors    probabilities [n, C] of the "validation" and the "test" images
    result.json                what came of it

A model is named by its label and the key of its features: a shelf on which those have changed is
refused, since heads say nothing about other features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import find_checkpoint, load_weights
from ..features import Shelf
from ..features.shelf import RECORD
from ..files import write_json
from ..model import HubPathway
from ..tasks.classification import Classification
from ..written import described
from .model import build_hub, join, router_model
from .settings import ShelfFitSettings

FORMAT = 1
FOLDER, HUB, RESULT, PREDICTIONS = "hub", "hub.json", "result.json", "predictions.safetensors"
CHECKPOINTS = ("best", "last")
ROUTER_PIXELS = 16  # a side, that the default stride leaves: the router only tells images apart


@dataclass(frozen=True, eq=False)
class ShelfHub:
    """A hub that was fitted on a shelf.

    model: in evaluation mode, takes numbers ``view * n + image``, float64 [N]. models: of its
    experts, their numbers on the shelf. watched: the model whose features the router looks at, None
    where that is the image.
    """

    folder: Path
    shelf: Shelf
    model: HubPathway
    models: tuple[int, ...]
    settings: ShelfFitSettings
    watched: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.shelf.models[i].label for i in self.models)

    @property
    def task(self) -> Classification:
        return shelf_task(self.shelf, self.settings)


def shelf_task(shelf: Shelf, settings: ShelfFitSettings) -> Classification:
    return Classification(shelf.classes, settings.label_smoothing)


def build(
    shelf: Shelf, models: Sequence[int], settings: ShelfFitSettings, heads: Sequence | None = None
) -> HubPathway:
    """The model of such settings. heads: fitted ones, of these models, that it starts from."""
    size = shelf.record.router_size or ROUTER_PIXELS
    stride = settings.generator_stride
    return build_hub(
        shelf,
        models,
        settings.k,
        settings.router,
        heads,
        settings.aggregator,
        width=settings.generator_width,
        stride=max(1, size // ROUTER_PIXELS) if stride is None else stride,
        renormalize=settings.renormalizes,
    )


def write_hub(
    folder: Path,
    shelf: Shelf,
    models: Sequence[int],
    settings: ShelfFitSettings,
    newcomers: int = 0,
) -> None:
    """Writes ``hub.json``. newcomers: the last of the models, which have joined a hub of the others
    (see ``shelf.add``). Raises OSError."""
    watched = router_model(shelf, settings.router)
    write_json(
        folder / HUB,
        {
            "format": FORMAT,
            "shelf": _path_of(shelf.folder, folder),
            "classes": list(shelf.classes),
            "models": [_named(shelf, i) for i in models],
            "newcomers": newcomers,
            "router": None if watched is None else _named(shelf, watched),
            "settings": settings.to_dict(),
        },
    )


@dataclass(frozen=True, eq=False)
class HubRecord:
    """What ``hub.json`` says, with its shelf opened: see ``ShelfHub``."""

    shelf: Shelf
    models: tuple[int, ...]
    watched: int | None
    settings: ShelfFitSettings
    newcomers: int = 0


def has_hub(folder: Path) -> bool:
    return (folder / HUB).is_file()


def read_hub(folder: Path, shelf: Shelf | None = None) -> HubRecord:
    """Reads ``hub.json``. shelf: None: the one that it names.

    Raises ValueError: no such file, or a damaged one; a shelf that is gone, that it is not of,
    whose classes are others, or whose features of a model have changed or are gone.
    """
    path = folder / HUB
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise ValueError(f"it has the format {held['format']!r}, this version reads {FORMAT}")
        settings = ShelfFitSettings.from_dict(held["settings"])
        named, router = [dict(each) for each in held["models"]], held["router"]
        names = [(str(each["label"]), str(each["key"])) for each in named]
        watched = None if router is None else (str(router["label"]), str(router["key"]))
        newcomers = int(held.get("newcomers", 0))
        where, classes = Path(held["shelf"]), tuple(map(str, held["classes"]))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            described(folder)
            or f"{folder} holds no hub of a shelf (no {HUB}); make one with hubpath shelf fit SHELF"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); run hubpath shelf fit again") from error
    own = (where if where.is_absolute() else folder / where).resolve()
    if shelf is None:
        shelf = Shelf.open(own)
    elif own != shelf.folder.resolve() and (own / RECORD).is_file():
        _check_copy(folder, own, shelf, {key for _, key in names})
    if shelf.classes != classes:
        raise ValueError(
            f"{shelf.folder} has other classes than the hub in {folder}; give the shelf that it "
            "was fitted on, or fit again"
        )
    models = tuple(_find(shelf, folder, *name) for name in names)
    looked_at = None if watched is None else _find(shelf, folder, *watched)
    return HubRecord(shelf, models, looked_at, settings, newcomers)


def open_hub(folder: str | Path, shelf: Shelf | None = None) -> ShelfHub:
    """Opens what ``hubpath shelf fit`` made, with its best weights, the last ones where nothing was
    evaluated.

    Args:
        folder: of the hub, or of a shelf, whose own hub it then is.
        shelf: that it is of, wherever it lies now; None: the one that the hub names.

    Raises:
        ValueError: there is none, or it was never trained; as of ``read_hub``; CheckpointError for
            weights that are damaged or of another model.
    """
    folder = Path(folder)
    if not has_hub(folder) and (folder / RECORD).is_file():
        folder = folder / FOLDER
    record = read_hub(folder, shelf)
    checkpoint = best_checkpoint(folder)
    old = len(record.models) - record.newcomers
    model = build(record.shelf, record.models[:old], record.settings)
    for index in record.models[old:]:
        join(model, record.shelf, index)
    load_weights(model, checkpoint)
    return ShelfHub(
        folder, record.shelf, model.eval(), record.models, record.settings, record.watched
    )


def best_checkpoint(folder: Path) -> Path:
    """The best one, the last where none was evaluated. Raises ValueError."""
    for path in (folder / name for name in CHECKPOINTS):
        if find_checkpoint(path):
            return path
    raise ValueError(
        f"{folder} has no checkpoint yet; finish hubpath shelf fit with --resume first"
    )


def read_result(folder: Path) -> Mapping[str, Any]:
    """What came of it. Raises ValueError where it has not ended."""
    try:
        return dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {RESULT} yet; finish hubpath shelf fit with --resume first"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / RESULT} is damaged ({error}); delete it, and fit with --resume"
        ) from error


def _named(shelf: Shelf, index: int) -> dict[str, str]:
    model = shelf.models[index]
    return {"label": model.label, "name": model.name, "key": model.key}


def _path_of(shelf: Path, folder: Path) -> str:
    """Relative where the hub lies in the shelf: both may be moved together."""
    inside, outer = folder.resolve(), shelf.resolve()
    return os.path.relpath(outer, inside) if outer in inside.parents else str(outer)


def _check_copy(folder: Path, own: Path, shelf: Shelf, keys: set[str]) -> None:
    """Raises ValueError unless a shelf has the features of ``own``, that the hub in a folder was
    fitted on: it may be a copy."""
    if not keys <= {model.key for model in shelf.models}:
        raise ValueError(
            f"hub: {folder} is of the shelf {own}, not of {shelf.folder}; give that shelf, or a "
            "hub of this one"
        )


def _find(shelf: Shelf, folder: Path, label: str, key: str) -> int:
    for i, model in enumerate(shelf.models):
        if model.key == key:
            return i
    if label in shelf.labels:
        raise ValueError(
            f"{shelf.folder}: the features of {label} have changed since the hub in {folder} was "
            "fitted (other weights, preprocessing or images); fit again"
        )
    raise ValueError(
        f"{shelf.folder} has no features of {label}, which the hub in {folder} routes to; extract "
        "them again, or fit again"
    )
