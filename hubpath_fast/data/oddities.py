"""What deserves a word about images that can be trained on: copies, contradictions, skew, names."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .copies import equal_files
from .layouts import examples
from .splits import ImageSplit, ImageSplits

SKEWED = 0.9  # share of train that is one class


@dataclass(frozen=True)
class Oddity:
    """A sentence, and an example of it. serious: figures may be wrong because of it."""

    text: str
    example: str = ""
    serious: bool = False

    def __str__(self) -> str:
        return f"{self.text}: {self.example}" if self.example else self.text


def find_oddities(splits: ImageSplits) -> list[Oddity]:
    """Of a set of image files, with the validation images that are held out."""
    files = {s: part for s, part in splits.distinct.items() if isinstance(part, ImageSplit)}
    return [
        *copies(files, splits.classes),
        *skew(splits.train.targets, splits.classes),
        *strange_names(splits.classes),
    ]


def in_a_line(oddities: Sequence[Oddity], root: Path) -> tuple[str, ...]:
    """One note on all of them; none if there are none."""
    if not oddities:
        return ()
    return (f"{'; '.join(map(str, oddities))}; `hubpath data check {root}` says more",)


def copies(splits: dict[str, ImageSplit], classes: Sequence[str]) -> list[Oddity]:
    """Images whose files are equal byte by byte: in two splits, with two classes, and the rest."""
    images = [
        (path, split, classes[target])
        for split, part in splits.items()
        for path, target in zip(part.paths, part.targets, strict=True)
    ]
    across, contradicting, repeated = [], [], []
    for group in equal_files([path for path, _, _ in images]):
        same = [images[i] for i in group]
        first = same[0]
        other = next((image for image in same if image[1] != first[1]), None)
        if other:
            across.append(_pair(first, other, 1))
        unlike = next((image for image in same if image[2] != first[2]), None)
        if unlike:
            contradicting.append(_pair(first, unlike, 2))
        if not other and not unlike:
            repeated.append(_pair(first, same[1]))
    kinds = (
        (across, "image is in two splits", "images are in two splits", True),
        (contradicting, "image has two classes", "images have two classes", True),
        (repeated, "image is there more than once", "images are there more than once", False),
    )
    return [
        Oddity(f"1 {one}" if len(found) == 1 else f"{len(found):,} {many}", found[0], serious)
        for found, one, many, serious in kinds
        if found
    ]


def _pair(first: tuple, second: tuple, what: int | None = None) -> str:
    """what: which part of the two images differs and is said."""
    if what is None:
        return f"{first[0]} = {second[0]}" if first[0] != second[0] else f"{first[0]} (twice)"
    if first[0] == second[0]:
        return f"{first[0]} ({first[what]} and {second[what]})"
    return f"{first[0]} ({first[what]}) = {second[0]} ({second[what]})"


def skew(targets: Sequence[int], classes: Sequence[str]) -> list[Oddity]:
    if not targets:
        return []
    [(target, count)] = Counter(targets).most_common(1)
    share = count / len(targets)
    if share < SKEWED or len(classes) == 1:
        return []
    often = f"{100 * share:.0f} %"
    return [Oddity(f"{often} of train are {classes[target]}: always saying so is right as often")]


def strange_names(classes: Sequence[str]) -> list[Oddity]:
    """Classes whose names differ in capitals, blanks or forms of letters only, or say no class."""
    by_fold = defaultdict(list)
    for name in classes:
        plain = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()
        by_fold[plain].append(name)
    alike = [" and ".join(map(repr, names)) for names in by_fold.values() if len(names) > 1]
    found = [Oddity("classes with nearly the same name", examples(alike))] if alike else []
    if "-1" in classes:
        found.append(Oddity("a class is called -1, which as a rule marks images without a class"))
    return found
