"""A data set on disk against what was published: counts, classes, missing and broken files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .decode import broken_images
from .layouts import examples
from .named import FOLDER, find_dataset, open_dataset
from .sources import PUBLISHED
from .splits import ImageSplit, Split


@dataclass(frozen=True)
class CheckReport:
    """What was found. counts: (what, found, published or None). problems: a sentence each."""

    title: str
    counts: tuple[tuple[str, int, int | None], ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.problems


def check_dataset(name: str, root: str | Path | None, decode: bool = False) -> CheckReport:
    """Counts a set's splits and classes, and names what is missing, broken or twice.

    decode: read all pixels of every image, which finds JPEGs that were cut short, too.

    Raises ValueError for an unknown name, DataError for another layout than the set's, and for a
    user's own folder for all that ``open_images`` refuses.
    """
    name = find_dataset(name)
    if name not in PUBLISHED:
        return _check_own(name, root, decode)
    if root is None:
        raise ValueError(f"dataset {name!r} lies in a folder; give it (--root DIR)")
    published = PUBLISHED[name]
    classes, splits = published.open(Path(root))
    counts = [("classes", len(classes), published.classes)]
    counts += [(split, len(splits[split]), count) for split, count in published.counts.items()]
    problems = [
        f"{what}: {found} found, {expected} published"
        for what, found, expected in counts
        if found != expected
    ]
    for split, data in splits.items():
        problems += _empty_classes(split, data, classes)
        if isinstance(data, ImageSplit):
            problems += _files(split, data, decode)
    problems += _in_two_splits(splits)
    notes = (published.note,) if published.note else ()
    return CheckReport(published.title, tuple(counts), tuple(problems), notes)


def _check_own(name: str, root: str | Path | None, decode: bool) -> CheckReport:
    splits = open_dataset(name, root)
    parts = {"train": splits.train, "validation": splits.validation}
    if not splits.test_is_validation:
        parts["test"] = splits.test
    counts = [("classes", splits.num_classes, None)]
    counts += [(split, len(data), None) for split, data in parts.items()]
    problems = [
        problem
        for split, data in parts.items()
        if decode and isinstance(data, ImageSplit)
        for problem in _files(split, data, decode)
    ]
    title = str(root) if name == FOLDER else name
    return CheckReport(title, tuple(counts), (*problems, *_in_two_splits(parts)), splits.notes)


def _empty_classes(split: str, data: Split, classes: tuple[str, ...]) -> list[str]:
    present = Counter(data.targets)
    empty = [label for target, label in enumerate(classes) if not present[target]]
    return [f"{split}: no images of {len(empty)} classes: {examples(empty)}"] if empty else []


def _files(split: str, data: ImageSplit, decode: bool) -> list[str]:
    problems = []
    missing = [path for path in data.paths if not path.is_file()]
    if missing:
        problems.append(f"{split}: {len(missing)} images are missing: {examples(missing)}")
    gone = set(missing)
    broken = broken_images([path for path in data.paths if path not in gone], decode)
    if broken:
        problems.append(f"{split}: {len(broken)} images are broken: {examples(broken)}")
    return problems


def _in_two_splits(splits: dict[str, Split]) -> list[str]:
    """A test image that was trained on makes figures worthless."""
    seen: dict[Path, str] = {}
    twice = []
    for split, data in splits.items():
        for path in data.paths if isinstance(data, ImageSplit) else ():
            if seen.setdefault(path, split) != split:
                twice.append(f"{path} ({seen[path]} and {split})")
    return [f"{len(twice)} images are in two splits: {examples(twice)}"] if twice else []
