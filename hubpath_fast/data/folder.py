"""A user's own images: finds the splits below a folder, checks them, and holds out validation.

Everything that would spoil a long run, or its figures, is an error before training: broken images,
a single class, and a test set with other classes than training has.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .layouts import (
    DataError,
    LabelledFiles,
    check_gaps,
    class_folders,
    examples,
    read_folder,
    read_list,
)
from .order import generator

VALIDATION_NAMES = ("val", "valid", "validation")
CHECKING_THREADS = 8  # opening files waits for the disk, not for a core


@dataclass(frozen=True)
class ImageSplit:
    """Files and their classes: paths [n], targets [n], positions in the splits' classes."""

    paths: tuple[Path, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Sequence[int]) -> ImageSplit:
        return ImageSplit(
            tuple(self.paths[i] for i in indices), tuple(self.targets[i] for i in indices)
        )


@dataclass(frozen=True)
class ImageSplits:
    """A data set of image files.

    classes: names, in the order of the targets. validation: what settings and checkpoints are
    chosen on. test: what figures are reported on; the same as validation where
    ``test_is_validation``. notes: what a user should be told about how the splits came about.
    """

    classes: tuple[str, ...]
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    test_is_validation: bool
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def open_images(
    root: str | Path, validation: float = 0.15, seed: int = 0, verify: bool = True
) -> ImageSplits:
    """Finds the images below ``root``, in the first layout of these that is there:

    1. list files ``train.txt`` and optionally ``val.txt``, ``test.txt``: lines of ``path class``;
    2. folders ``train/CLASS/IMAGE`` and optionally ``val/`` and ``test/`` alike;
    3. ``CLASS/IMAGE``: one set, without splits.

    validation: the share of train, class by class, that is held out where there is no val; drawn by
    ``seed``. Without test, validation stands in for it. verify: open every image once, to find
    broken ones.

    Raises DataError if the folder or images are missing, an image is broken, there is a single
    class, numbered classes have gaps, val has a class that train has not, or test and train differ
    in their classes.
    """
    root = Path(root)
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}, but must be a share between 0 and 1")
    found = _find(root)
    train = found["train"]
    if train.source.is_file():
        check_gaps(train)
    _check_classes(found)
    if verify:
        verify_images([path for files in found.values() for path in files.paths])

    number = {name: i for i, name in enumerate(train.classes)}
    splits = {
        split: ImageSplit(files.paths, tuple(number[label] for label in files.labels))
        for split, files in found.items()
    }
    notes = []
    if "validation" not in splits:
        whole = splits["train"]
        kept, held = hold_out(whole.targets, validation, seed)
        if not held:
            raise DataError(
                f"{train.source} has a single image a class, so none can be held out for "
                f"validation; add images, or give {root}/val"
            )
        splits["train"], splits["validation"] = whole.subset(kept), whole.subset(held)
        notes.append(
            f"no validation split in {root}: {len(held)} of {len(whole)} training images held out "
            f"(seed {seed})"
        )
    test_is_validation = "test" not in splits
    if test_is_validation:
        splits["test"] = splits["validation"]
        notes.append(
            f"no test split in {root}: results are on the validation images, on which settings and "
            "checkpoints are chosen too, and so are a little too good"
        )
    return ImageSplits(
        train.classes, **splits, test_is_validation=test_is_validation, notes=tuple(notes)
    )


def _find(root: Path) -> dict[str, LabelledFiles]:
    """The splits that exist, by name; "train" always does."""
    if not root.is_dir():
        what = "is a file" if root.is_file() else "does not exist"
        raise DataError(f"the data folder {root} {what}; expected {_layouts(root)}")
    names = {"train": ("train",), "validation": VALIDATION_NAMES, "test": ("test",)}
    for ending, exists, read in (
        (".txt", Path.is_file, read_list),
        ("", Path.is_dir, read_folder),
    ):
        places = {
            split: next((p for n in some if exists(p := root / f"{n}{ending}")), None)
            for split, some in names.items()
        }
        if places["train"] is not None:
            return {split: read(place) for split, place in places.items() if place is not None}
        if any(places.values()):
            [place, *_] = filter(None, places.values())
            raise DataError(
                f"{root} has {place.name} but no train{ending}; expected {_layouts(root)}"
            )
    if not class_folders(root):
        raise DataError(f"{root} holds no images; expected {_layouts(root)}")
    return {"train": read_folder(root)}


def _layouts(root: Path) -> str:
    return (
        f"{root}/train/CLASS/IMAGE (and optionally val/ and test/ alike), {root}/CLASS/IMAGE, or "
        f"{root}/train.txt with lines of: path class (and optionally val.txt and test.txt)"
    )


def _check_classes(found: dict[str, LabelledFiles]) -> None:
    train = found["train"]
    empty = sorted(set(train.classes) - set(train.labels))
    if empty:
        raise DataError(
            f"{train.source} has no images of class {examples(empty)}; "
            "add some, or remove the class"
        )
    if len(train.classes) < 2:
        raise DataError(
            f"{train.source} has the one class {train.classes[0]!r}; there is nothing to tell "
            "apart. Expected a folder (or, in a list file, a last word) for each class"
        )
    for split in ("validation", "test"):
        if split not in found:
            continue
        files = found[split]
        unknown = sorted(set(files.labels) - set(train.classes))
        if unknown:
            raise DataError(
                f"{files.source} has images of class {examples(unknown)}, which {train.source} "
                "has not: no model trained on it could name them. Its classes: "
                + examples(train.classes)
            )
        absent = sorted(set(train.classes) - set(files.labels))
        if split == "test" and absent:
            raise DataError(
                f"{files.source} has no images of {len(absent)} of the {len(train.classes)} "
                f"classes of {train.source}: {examples(absent)}. Accuracy over fewer classes is "
                "not that of the task; add images of these classes, or remove them from train"
            )


def hold_out(targets: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(kept, held): positions in ``targets``, ascending, with ``share`` of each class held.

    At least one image of a class is held, unless it is the class's only one, and one is always
    kept.
    """
    by_class: dict[int, list[int]] = {}
    for i, target in enumerate(targets):
        by_class.setdefault(target, []).append(i)
    held = []
    for target, members in by_class.items():
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        order = torch.randperm(len(members), generator=generator(seed, "hold out", target))
        held += [members[i] for i in order[:count].tolist()]
    chosen = set(held)
    return [i for i in range(len(targets)) if i not in chosen], sorted(held)


def verify_images(paths: Sequence[Path]) -> None:
    """Opens every file and checks what can be checked without decoding; DataError if broken.

    PNG's checksums are all read; of a JPEG the header only, so that one that was cut short is found
    when it is decoded, by ``load_image``.
    """
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        problems = [problem for problem in pool.map(_problem, paths) if problem]
    if problems:
        raise DataError(
            f"{len(problems)} of {len(paths)} images cannot be read; replace or remove: "
            + examples(problems)
        )


def _problem(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, ...
        return f"{path} ({_reason(error)})"
    return None


def load_image(path: str | Path) -> Image.Image:
    """Decodes an image to RGB; DataError that names the path if it is broken or missing."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # see _problem
        raise DataError(f"cannot read the image {path} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    # PIL repeats the path in this one message.
    return "no image file" if isinstance(error, Image.UnidentifiedImageError) else str(error)
