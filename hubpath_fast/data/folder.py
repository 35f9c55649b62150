"""A user's own images: finds the splits below a folder, checks them, and holds out validation.

Everything that would spoil a long run, or its figures, is an error before training: broken images,
a single class, and a test set with other classes than training has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .decode import verify_images
from .kinds import is_image
from .layouts import DataError, LabelledFiles, Problem, examples, named, read_folder
from .lists import gap_problem, scan_list
from .names import one_form
from .oddities import find_oddities, in_a_line
from .splits import ImageSplit, ImageSplits, assemble, check_share
from .walk import LITTER, Entries, Leftovers, Skipped, images_below, list_folder

SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
SPLIT_FOLDERS = {name for names in SPLIT_NAMES.values() for name in names}
# As others call them, in lower case; no set has these as its only classes.
LIKE_SPLITS = {"train", "training", "trainval", "val", "valid", "validation", "dev", "eval", "test",
               "testing"}  # fmt: skip
IN_NOTE = 3  # reasons for which something was left out, then a count


def open_images(
    root: str | Path, validation: float = 0.15, seed: int = 0, verify: bool = True
) -> ImageSplits:
    """Finds the images below ``root``, in the first layout of these that is there:

    1. list files ``train.txt`` and optionally ``val.txt``, ``test.txt``: lines of ``path class``;
    2. folders ``train/CLASS/IMAGE`` and optionally ``val/`` and ``test/`` alike;
    3. ``CLASS/IMAGE``: one set, without splits.

    validation: the share of train, class by class, that is held out where there is no val; drawn by
    ``seed``; 0: hold out nothing. Without test, validation stands in for it. verify: open every
    image once, to find broken ones, and copies.

    Raises DataError if the folder or images are missing, an image is broken, there is a single
    class, numbered classes have gaps, val has a class that train has not, or test and train differ
    in their classes.
    """
    root = Path(root)
    check_share(validation)
    found = find_splits(root)
    refuse(class_problems(found), root)
    if verify:
        verify_images([path for files in found.values() for path in files.paths])
    splits = make_splits(found, root, validation, seed)
    notes = [*splits.notes, *left_out(found, root)]
    if verify:
        notes += in_a_line(find_oddities(splits), root)
    return replace(splits, notes=tuple(notes))


def make_splits(
    found: dict[str, LabelledFiles], root: Path, validation: float = 0.15, seed: int = 0
) -> ImageSplits:
    """The set of what was found, with what is missing made; see ``assemble``."""
    classes = found["train"].classes
    splits = image_splits(found, classes)
    return assemble(classes, splits, root, validation, seed, f"give {root}/val")


def image_splits(found: dict[str, LabelledFiles], classes: Sequence[str]) -> dict[str, ImageSplit]:
    """What was found, with each label as its position in ``classes``, which has all of them."""
    number = {name: i for i, name in enumerate(classes)}
    return {
        split: ImageSplit(files.paths, tuple(number[label] for label in files.labels))
        for split, files in found.items()
    }


def all_skipped(found: dict[str, LabelledFiles]) -> tuple[Skipped, ...]:
    """What all splits left out."""
    leftovers = Leftovers()
    for files in found.values():
        leftovers.merge(files.skipped)
    return leftovers.all()


def left_out(found: dict[str, LabelledFiles], root: str | Path) -> tuple[str, ...]:
    """A note on what all splits left out, if there is more than litter."""
    told = [skipped for skipped in all_skipped(found) if not skipped.is_litter]
    if not told:
        return ()
    parts = [skipped.shown() for skipped in told[:IN_NOTE]]
    more = sum(skipped.count for skipped in told[IN_NOTE:])
    parts += [f"{more:,} others"] if more else []
    return (f"left out: {', '.join(parts)}; `hubpath data check {root}` says more",)


def find_splits(root: str | Path, require_train: bool = True) -> dict[str, LabelledFiles]:
    """The splits below ``root`` that exist, by name: "train", "validation", "test"; in the first
    of ``open_images``' layouts that is there. Folders of classes without splits are "train".

    require_train: a set without train is an error; False: of val/ and test/, one is enough.

    Raises DataError if a split has no images, or images that a list names are missing.
    """
    found = survey(root, require_train)
    refuse([problem for files in found.values() for problem in files.problems], Path(root))
    return found


def refuse(problems: Sequence[Problem], root: Path) -> None:
    """Raises DataError if there is a problem, and says how many more there are."""
    if not problems:
        return
    more = len(problems) - 1
    others = f" ({more} more of such: `hubpath data check {root}` lists all)" if more else ""
    raise DataError(f"{problems[0]}{others}")


def survey(root: str | Path, require_train: bool = True) -> dict[str, LabelledFiles]:
    """``find_splits``, whose problems with single splits are theirs, and not raised."""
    root = Path(root)
    if not _is_folder(root):
        file = root.is_file()
        what = "is a file: give its folder" if file else "does not exist"
        expected = _layouts(root.parent if file else root)
        raise DataError(f"the data folder {root} {what}; expected {expected}")
    leftovers = Leftovers()
    entries = list_folder(root, leftovers, root=True)
    for ending, there, read in (
        (".txt", entries.files, scan_list),
        ("", entries.folders, read_folder),
    ):
        places = _places(root, ending, there)
        if "train" in places or (places and not require_train):
            found = {split: read(place) for split, place in places.items()}
            if not ending:
                _note_neighbours(found, entries, leftovers)
            return found
        if places:
            [place, *_] = places.values()
            raise DataError(
                f"{root} has {place.name} but no train{ending}; expected {_layouts(root)}"
            )
    if not entries.folders:
        loose = [path for path in entries.files if is_image(path)]
        what = "images, but none in a folder of its class" if loose else "no images"
        raise DataError(f"{named(root)} holds {what}{_found(leftovers)}; expected {_layouts(root)}")
    names = [path.name for path in entries.folders]
    if all(name.lower() in LIKE_SPLITS for name in names):
        raise DataError(
            f"{root} holds {examples(names)}, which look like splits and would be classes; call "
            "them train, val and test"
        )
    return {"train": read_folder(root)}


def _is_folder(root: Path) -> bool:
    try:
        return root.is_dir()
    except OSError as error:
        raise DataError(f"the data folder {root} cannot be read ({error.strerror})") from error


def _found(leftovers: Leftovers) -> str:
    found = [skipped.shown() for skipped in leftovers.all()]
    return f" (but {examples(found)})" if found else ""


def _places(root: Path, ending: str, there: list[Path]) -> dict[str, Path]:
    """The files or folders of splits, by split."""
    places = {}
    for split, names in SPLIT_NAMES.items():
        known = [place for name in names if (place := root / f"{name}{ending}") in there]
        if known:
            places[split] = known[0]
    return places


def _note_neighbours(
    found: dict[str, LabelledFiles], entries: Entries, leftovers: Leftovers
) -> None:
    """Counts what lies beside train/, val/ and test/ with what the first of them left out."""
    [first, *_] = found
    splits = {files.source for files in found.values()}
    for path in entries.folders:
        inside = Leftovers()
        if path in splits:
            continue
        if next(images_below(path, inside), None):
            leftovers.add(f"folders beside {found[first].source.name}/", path)
        elif inside.no_class():
            leftovers.merge(inside.all())
        else:
            leftovers.add("folders without images", path, LITTER)
    for path in filter(is_image, entries.files):
        leftovers.add(f"images beside {found[first].source.name}/", path)
    leftovers.merge(found[first].skipped)
    found[first] = replace(found[first], skipped=leftovers.all())


def _layouts(root: Path) -> str:
    return (
        f"{root}/train/CLASS/IMAGE (and optionally val/ and test/ alike), {root}/CLASS/IMAGE, or "
        f"{root}/train.txt with lines of: path class (and optionally val.txt and test.txt)"
    )


def class_problems(found: dict[str, LabelledFiles]) -> list[Problem]:
    """What a run refuses of the classes of train, and of the others' beside them."""
    train = found["train"]
    problems = []
    if train.source.is_file() and (gaps := gap_problem(train)):
        problems.append(gaps)
    empty = sorted(set(train.classes) - set(train.labels))
    if empty and train.paths:
        problems.append(_empty_classes(train, empty))
    if len(train.classes) == 1:
        problems.append(_one_class(train))
    for split in ("validation", "test"):
        if split in found and train.paths:
            problems += _other_classes(train, found[split], split)
    return problems


def _empty_classes(train: LabelledFiles, empty: list[str]) -> Problem:
    """With what lies in the folders of these classes instead of images."""
    inside = [
        skipped.shown()
        for skipped in train.skipped
        if not skipped.is_litter and one_form(_first_folder(train, skipped.example)) in empty
    ]
    return Problem(
        f"{train.source} has no images of class {examples(empty)}"
        + (f", but {examples(inside)}" if inside else ""),
        "; add some, or remove the class",
    )


def _first_folder(train: LabelledFiles, path: Path) -> str:
    inside = path.relative_to(train.source) if path.is_relative_to(train.source) else path
    return inside.parts[0] if inside.parts else ""


def _one_class(train: LabelledFiles) -> Problem:
    name = train.classes[0]
    folder = train.source / name
    folders = list_folder(folder, Leftovers()).folders if folder.is_dir() else []
    inside = f"; {folder} holds folders itself: is it the data?" if len(folders) > 1 else ""
    return Problem(
        f"{train.source} has the one class {name!r}{inside}",
        "; there is nothing to tell apart. Expected a folder (or, in a list file, a last word) for "
        "each class",
    )


def _other_classes(train: LabelledFiles, files: LabelledFiles, split: str) -> list[Problem]:
    problems = []
    unknown = sorted(set(files.labels) - set(train.classes))
    if unknown:
        problems.append(
            Problem(
                f"{files.source} has images of class {examples(unknown)}, which {train.source} has "
                "not",
                ": no model trained on it could name them. Its classes: " + examples(train.classes),
            )
        )
    absent = sorted(set(train.classes) - set(files.labels))
    if split == "test" and absent and files.paths:
        problems.append(
            Problem(
                f"{files.source} has no images of {len(absent)} of the {len(train.classes)} "
                f"classes of {train.source}: {examples(absent)}",
                ". Accuracy over fewer classes is not that of the task; add images of these "
                "classes, or remove them from train",
            )
        )
    return problems
