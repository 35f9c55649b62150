"""A data set on disk: against what was published, or a user's own with all that a run would refuse
or mention."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .decode import CHECKING_THREADS, broken_images
from .folder import all_skipped, class_problems, image_splits, make_splits, survey
from .layouts import DataError, LabelledFiles, examples
from .named import DIGITS, FOLDER, SPELLINGS, find_dataset, open_dataset, plain_name
from .names import is_gone
from .oddities import copies, find_oddities, skew, strange_names
from .sources import PUBLISHED
from .splits import ImageSplit, ImageSplits, Split
from .walk import MAYBE_IMAGES, NO_IMAGES, Leftovers, Skipped, walk

SMALL = 16  # pixels a side, below which an image is rather a thumbnail or a mistake


@dataclass(frozen=True)
class CheckReport:
    """What was found. counts: (what, found, published or None). refused: a sentence for each thing
    for which `hubpath fit` would stop. problems: for each that spoils figures, such as images that
    are missing or left out. notes: what is good to know. skipped: how many files and folders were
    left out, those of systems among them. things: what is counted, and command: what trains on
    them."""

    title: str
    counts: tuple[tuple[str, int, int | None], ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    skipped: int = 0
    things: str = "images"
    command: str = "hubpath fit"

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; what was left out is none of the user's images."""
        return not self.problems and not self.refused

    @property
    def complete(self) -> bool:
        """Whether nothing is wrong and nothing was left out."""
        return self.sound and not self.skipped


def check_dataset(
    name: str | None = None, root: str | Path | None = None, decode: bool = False
) -> CheckReport:
    """Counts a set's splits and classes, and names what is missing, broken, left out or twice.

    name: of a data set, whose folder is ``root``, or a user's own folder. decode: read all pixels
    of every image, which finds JPEGs that were cut short, too.

    Raises ValueError for an unknown name, DataError for another layout than the set's, and for a
    user's own folder if no images can be looked for.
    """
    name, root = _which(name, root)
    if name == FOLDER:
        return _check_own(Path(root), decode)
    if name == DIGITS:
        return _check_digits()
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


def _which(name: str | None, root: str | Path | None) -> tuple[str, str | Path | None]:
    """The data set, by its name in ``DATASETS``, and its folder, of what a user typed."""
    if name is None:
        if root is None:
            raise ValueError(
                "name: nothing given; `hubpath data check FOLDER` looks at your own images, "
                "`hubpath data check NAME --root DIR` at a set of `hubpath data list`"
            )
        return FOLDER, root
    known, exists = plain_name(name) in SPELLINGS, os.path.exists(name)
    if Path(name).name != name or (exists and not known):  # "." and "cars/" are no names
        if root is not None:
            raise ValueError(f"root: {name} is a folder itself; give it or --root {root}")
        return FOLDER, name
    try:
        found = find_dataset(name)
    except ValueError as error:
        raise ValueError(f"{error}; and there is no folder {name}") from None
    if found == DIGITS:
        if root is None:
            return DIGITS, None
        raise ValueError(
            f"root: {DIGITS} come with scikit-learn and lie in no folder; leave --root {root} out, "
            f"or look at your own images by `hubpath data check {root}`"
        )
    if root is not None:
        return found, root
    if found == FOLDER:
        if exists:
            return FOLDER, name
        raise ValueError("root: your own images lie in a folder; `hubpath data check PATH`")
    own = f"; for your own images in {name}: `hubpath data check ./{name}`" if exists else ""
    raise ValueError(f"dataset {found!r} lies in a folder; give it (--root DIR){own}")


def _check_digits() -> CheckReport:
    splits = open_dataset(DIGITS)
    return CheckReport(DIGITS, _counts(splits), (), splits.notes)


def _check_own(root: Path, decode: bool) -> CheckReport:
    """All that ``open_images`` refuses, not only the first, and all that it mentions."""
    found = survey(root)
    problems = [problem for files in found.values() for problem in files.problems]
    refused = [problem.listed() for problem in (*problems, *class_problems(found))]
    classes = _all_classes(found)
    whole = image_splits(found, classes)
    for split, data in whole.items():
        refused += _files(split, data, decode)
    try:
        splits = None if refused else make_splits(found, root)
    except DataError as error:
        refused.append(str(error))
        splits = None
    if splits is None:
        odd = [*copies(whole, classes), *skew(whole["train"].targets, classes)]
        odd += strange_names(classes)
        counts = [("classes", len(found["train"].classes), None)]
        counts += [(split, len(data), None) for split, data in whole.items()]
    else:
        odd, counts = find_oddities(splits), _counts(splits)
    skipped = all_skipped(found)
    return CheckReport(
        str(root),
        tuple(counts),
        (
            *(_left_out([s]) for s in skipped if s.weight == MAYBE_IMAGES),
            *(str(oddity) for oddity in odd if oddity.serious),
        ),
        (
            *(() if splits is None else splits.notes),
            *(str(oddity) for oddity in odd if not oddity.serious),
            *_small(whole),
            *_unlisted(root, found),
            *(_left_out([s]) for s in skipped if s.weight == NO_IMAGES),
            *([_left_out(litter)] if (litter := [s for s in skipped if s.is_litter]) else []),
        ),
        tuple(refused),
        sum(some.count for some in skipped),
    )


def _unlisted(root: Path, found: dict[str, LabelledFiles]) -> list[str]:
    """A line on images below the folder of list files that none of them names."""
    if not found["train"].source.is_file():
        return []
    listed = {os.path.abspath(path) for files in found.values() for path in files.paths}
    others = [path for path in walk(root, Leftovers(), True) if os.path.abspath(path) not in listed]
    return [f"images that no list names: {len(others):,}, such as {others[0]}"] if others else []


def _left_out(skipped: Sequence[Skipped]) -> str:
    return f"left out: {examples([some.shown() for some in skipped])}"


def _counts(splits: ImageSplits) -> tuple[tuple[str, int, None], ...]:
    sizes = [(split, len(data), None) for split, data in splits.distinct.items()]
    return (("classes", splits.num_classes, None), *sizes)


def _all_classes(found: dict[str, LabelledFiles]) -> tuple[str, ...]:
    """Train's first."""
    return tuple(dict.fromkeys(name for files in found.values() for name in files.classes))


def _small(splits: dict[str, ImageSplit]) -> list[str]:
    """A line on images that are smaller than any network's; reads their heads."""

    def side(path: Path) -> int:
        try:
            with Image.open(path) as image:
                return min(image.size)
        except Exception:  # is said to be broken
            return SMALL

    paths = [path for data in splits.values() for path in data.paths]
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        small = [path for path, s in zip(paths, pool.map(side, paths), strict=True) if s < SMALL]
    if not small:
        return []
    return [f"images with a side below {SMALL} pixels: {len(small):,}, such as {small[0]}"]


def _empty_classes(split: str, data: Split, classes: tuple[str, ...]) -> list[str]:
    present = Counter(data.targets)
    empty = [label for target, label in enumerate(classes) if not present[target]]
    return [f"{split}: no images of {len(empty)} classes: {examples(empty)}"] if empty else []


def _files(split: str, data: ImageSplit, decode: bool) -> list[str]:
    problems = []
    missing = [path for path in data.paths if is_gone(path)]
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
