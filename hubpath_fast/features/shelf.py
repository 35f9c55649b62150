"""A shelf: of every model the features of every image, computed once, in a folder.

    SHELF/shelf.json                 what it is of: ``ShelfRecord``
    SHELF/images.csv.gz              the list of its images, where they are files
    SHELF/targets.safetensors        "targets" int64 [n]
    SHELF/router.safetensors         "pixels" uint8 [V, n, 3, s, s], for a router on the image
    SHELF/features/KEY.safetensors   of one model, with what is known of it in its header

A model is one file, and there is no other index: a file that is whole is on the shelf, whatever was
killed beside it. Of two files of one label the newer one counts: an extraction was killed before it
could delete the other. A model that failed when it was tried with other weights is not on the shelf
until it succeeds; its file stays, since the weights may come back. Features are mapped, so a shelf
may be larger than memory; rows come in as they are read. Images are numbered over all splits: those
of train first, then validation, then test.

Letters: n images, V views, D features, C classes, S classes of a source head.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.kept import FileList
from ..written import described, lacks

FORMAT = 1
RECORD, IMAGES, TARGETS, ROUTER = (
    "shelf.json", "images.csv.gz", "targets.safetensors", "router.safetensors",
)  # fmt: skip
FEATURES = "features"  # the folder of the models' files
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ShelfModel:
    """A model on the shelf.

    name: as a hub takes it, with options. label: short, no two alike. position: models are in
    ascending order of it. key: of its file, a hash of all that determines its features. weights:
    the SHA-256 of its weights; empty where they are not known. num_features: D. size: pixels a side
    of its images. parameters, flops: of its body; None where they are not known. ms: of a forward
    pass, milliseconds an image, as measured while its features were computed; None where they were
    not computed here. source_classes: S, of the head that it was pre-trained with; 0: no such head.
    """

    name: str
    label: str
    position: int
    key: str
    num_features: int
    weights: str = ""
    size: int | None = None
    parameters: int | None = None
    flops: int | None = None
    ms: float | None = None
    source_classes: int = 0


@dataclass(frozen=True)
class ShelfRecord:
    """What a shelf is of.

    classes: their names, in the order of the targets. sizes: images of train, validation and test.
    test_is_validation: there are no test images of their own; results are on validation. dtype: of
    the features, "fp16" or "fp32". views: V; the first is the crop of evaluation, the others are
    random ones, by seed, flip and min_area. image_size: pixels a side that all models work at;
    None: each at its own. router_size: of the router's pixels; None: there are none.
    router_crop: of the crops that those were resized from; None: the same. data, dataset,
    validation: where the images came from, as ``fit`` names it; empty where they are tensors of
    one's own. pretrained: False: of random weights, all its models'. digest: of the images' list
    and targets. failed: models that were left out, and why.
    """

    classes: tuple[str, ...]
    sizes: tuple[int, int, int]
    dtype: str
    views: int = 1
    digest: str = ""
    seed: int = 0
    flip: bool = True
    min_area: float = 0.08
    image_size: int | None = None
    router_size: int | None = None
    router_crop: int | None = None
    data: str = ""
    dataset: str = ""
    validation: float = 0.0
    test_is_validation: bool = False
    pretrained: bool = True
    failed: tuple[tuple[str, str], ...] = ()
    format: int = FORMAT

    @property
    def num_images(self) -> int:
        return sum(self.sizes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShelfRecord:
        """Raises KeyError, TypeError or ValueError for what ``to_dict`` did not write."""
        if values.get("format") != FORMAT:
            raise ValueError(
                f"it has the format {values.get('format')!r}, and this version reads {FORMAT}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        told = {name: _as_tuple(value) for name, value in values.items() if name in known}
        record = cls(**told)
        if record.dtype not in DTYPES or len(record.sizes) != len(SPLITS) or record.views < 1:
            raise ValueError("its record is not one of a shelf")
        return record


class Shelf:
    """An opened shelf.

    folder: where it lies. record: what it is of. models: in the order of their positions. targets:
    int64 [n]. splits: numbers of the images of "train", "validation" and "test", int64; those of
    validation stand in for test where there are no test images of their own.
    """

    def __init__(
        self,
        folder: Path,
        record: ShelfRecord,
        models: Sequence[ShelfModel],
        targets: Tensor,
    ):
        self.folder, self.record, self.targets = folder, record, targets
        self.models = tuple(sorted(models, key=lambda model: (model.position, model.label)))
        ends = torch.tensor((0, *record.sizes)).cumsum(0).tolist()
        self.splits = {name: torch.arange(ends[i], ends[i + 1]) for i, name in enumerate(SPLITS)}
        if record.test_is_validation:
            self.splits["test"] = self.splits["validation"]
        self._features: dict[str, Tensor] = {}

    @classmethod
    def open(cls, folder: str | Path, models: bool = True) -> Shelf:
        """Opens what ``hubpath shelf extract`` or ``write_shelf`` made.

        models: False: as an extraction sees it, with the models that failed since, and a shelf
            without a single one is one, too.

        Raises ValueError: no shelf, or one of which a file is damaged or does not fit the others.
        """
        folder = Path(folder)
        record = read_record(folder)
        found = _read_models(folder / FEATURES, record)
        if models:
            failed = dict(record.failed)
            found = [model for model in found if model.name not in failed]
            if not found:
                raise ValueError(
                    f"{folder} holds no features yet; compute some with hubpath shelf extract"
                )
        targets = _open(folder / TARGETS, "targets", (record.num_images,), torch.int64)
        if record.num_images and not 0 <= targets.min() <= targets.max() < len(record.classes):
            raise damaged(folder / TARGETS, "its classes are not those of the shelf")
        return cls(folder, record, found, targets)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.record.classes

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(model.label for model in self.models)

    def features(self, index: int) -> Tensor:
        """[V, n, D] of a model, float16 or float32, mapped from its file: nothing is read yet."""
        model = self.models[index]
        if model.key not in self._features:
            record = self.record
            shape = (record.views, record.num_images, model.num_features)
            path = self.folder / FEATURES / f"{model.key}.safetensors"
            self._features[model.key] = _open(path, "features", shape, DTYPES[record.dtype])
        return self._features[model.key]

    def source_head(self, index: int) -> tuple[Tensor, Tensor] | None:
        """(weight [S, D], bias [S]), float32, of the linear head that a model was pre-trained with,
        on its features; None where it has none."""
        model = self.models[index]
        if not model.source_classes:
            return None
        path = self.folder / FEATURES / f"{model.key}.safetensors"
        shape = (model.source_classes, model.num_features)
        weight = _open(path, "source_weight", shape, torch.float32)
        return weight, _open(path, "source_bias", shape[:1], torch.float32)

    def pixels(self) -> Tensor | None:
        """uint8 [V, n, 3, s, s], mapped: the images as a router sees them; None: there are none."""
        record, size = self.record, self.record.router_size
        if size is None:
            return None
        shape = (record.views, record.num_images, 3, size, size)
        return _open(self.folder / ROUTER, "pixels", shape, torch.uint8)

    def find(self, name: str) -> int:
        """The number of a model by its label, or its name. Raises ValueError."""
        for known in (self.labels, [model.name for model in self.models]):
            if name in known:
                return list(known).index(name)
        close = difflib.get_close_matches(name, self.labels, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"{self.folder} has no features of a model {name!r}{hint} "
            f"(it has {len(self.models)}, see hubpath shelf rank)"
        )

    def images(self) -> FileList | None:
        """The list of its images; None where they are no files. Raises ValueError."""
        path = self.folder / IMAGES
        return FileList.read(path) if path.is_file() else None


def read_record(folder: Path) -> ShelfRecord:
    """Of the shelf in a folder. Raises ValueError where there is none, or it is damaged."""
    path = folder / RECORD
    try:
        return ShelfRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            described(folder)
            or f"{folder} is no shelf: {lacks(folder, RECORD)}; make one with "
            "hubpath shelf extract --data FOLDER --hub NAMES --out SHELF"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, str(error)) from error


def _read_models(folder: Path, record: ShelfRecord) -> list[ShelfModel]:
    """Those of the files in a folder, of each label the newest. Raises ValueError."""
    gone = None
    while True:
        found = []
        for path in sorted(folder.glob("*.safetensors")):
            try:
                found.append((path.stat().st_mtime_ns, read_model(path, record)))
            except FileNotFoundError as error:
                if path == gone:  # a link to nowhere
                    raise damaged(path, str(error)) from error
                gone = path  # an extraction has just put another in its place: look again
                break
        else:
            found.sort(key=lambda pair: pair[0])
            return list({model.label: model for _, model in found}.values())


def read_model(path: Path, record: ShelfRecord) -> ShelfModel:
    """What a file of features says of its model, by its header alone. Raises ValueError where the
    file is damaged, or is none of this shelf; FileNotFoundError where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            model = ShelfModel(**json.loads(file.metadata()["model"]))
            features = file.get_slice("features")
            shape, dtype = features.get_shape(), features.get_dtype()
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from error
    expected = [record.views, record.num_images, model.num_features]
    if shape != expected or dtype != {"fp16": "F16", "fp32": "F32"}[record.dtype]:
        raise damaged(
            path, f"expected {record.dtype} features of shape {expected}, got {dtype} {shape}"
        )
    if path.stem != model.key:
        raise damaged(path, f"it is of the key {model.key}")
    return model


def digest_of(
    images: FileList | None, targets: Tensor, sizes: Sequence[int], classes: Sequence[str]
) -> str:
    """Tells one list of images from another: by paths, sizes, splits and classes of files, and of
    what lies in no files by their classes and the sizes of the splits."""
    found = hashlib.sha256(targets.to(torch.int64).contiguous().numpy().tobytes())
    if images is None:
        found.update(json.dumps([list(sizes), list(classes)]).encode())
    else:
        rows = {split: [list(row) for row in part] for split, part in images.rows.items()}
        found.update(json.dumps(rows, sort_keys=True).encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}); delete it and run hubpath shelf extract again, which "
        "computes what is missing"
    )


def _open(path: Path, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of a file, mapped. Raises ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error
    if tensor.shape != torch.Size(shape) or tensor.dtype != dtype:
        raise damaged(
            path,
            f"expected {name} {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}",
        )
    return tensor


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
