"""What is known of a kind of landmarks: how many, their pairs under a mirror, what errors are
measured against. ``LAYOUTS`` has the published sets, ``FACES`` how many faces they have.

Letters: L landmarks, numbered from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ...fields import there_are


@dataclass(frozen=True)
class LandmarkLayout:
    """Facts of one kind of landmarks.

    name: as settings have it. num_points: L. flip: landmark i of a mirrored picture is landmark
    ``flip[i]`` of the picture, a permutation that is its own inverse; None where it is not known,
    and then nothing may be mirrored. origin: the number that annotations give to the centre of the
    first pixel, 0 or 1. sigma: of the targets' bumps, in cells. outer_eye_corners: two landmarks,
    whose distance is the "ocular" unit. pupils: of each eye the landmarks whose mean is its pupil;
    "pupil" is the distance of the two. names: of the landmarks; numbers if none are given. unit:
    what errors are divided by unless something else is asked for: "ocular", "pupil", "diagonal" or
    two landmarks' numbers as "I-J"; if not given, "ocular" where the corners are known, else
    "diagonal".

    Raises:
        ValueError: a permutation of another length or that is not its own inverse, a landmark that
            is not there, an origin other than 0 and 1, names that are not L different ones.
    """

    name: str
    num_points: int
    flip: tuple[int, ...] | None = None
    origin: int = 0
    sigma: float = 1.5
    outer_eye_corners: tuple[int, int] | None = None
    pupils: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    names: tuple[str, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        count = self.num_points
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"num_points: expected a number of landmarks >= 1, got {count!r}")
        if self.origin not in (0, 1):
            raise ValueError(
                f"origin: expected 0 or 1, the number of the first pixel's centre, got "
                f"{self.origin!r}"
            )
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma: expected cells of the map > 0, got {self.sigma!r}")
        if self.flip is not None:
            object.__setattr__(self, "flip", _checked_flip(tuple(self.flip), count))
        corners = self.outer_eye_corners
        if corners is not None:
            self._check_landmarks("outer_eye_corners", corners)
            if len(corners) != 2 or corners[0] == corners[1]:
                raise ValueError(f"outer_eye_corners: expected two landmarks, got {corners}")
        for eye in self.pupils or ():
            self._check_landmarks("pupils", eye)
        names = tuple(self.names) or tuple(str(number) for number in range(count))
        if len(names) != count or len(set(names)) != count:
            raise ValueError(
                f"names: expected {count} different names, one a landmark, got {len(names)}, "
                f"{len(set(names))} of them different"
            )
        object.__setattr__(self, "names", names)
        if not self.unit:
            object.__setattr__(self, "unit", "diagonal" if corners is None else "ocular")

    def _check_landmarks(self, name: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            if not 0 <= number < self.num_points:
                raise ValueError(
                    f"{name}: expected landmarks 0..{self.num_points - 1}, got {number}"
                )


def flip_of_pairs(pairs: Iterable[tuple[int, int]], num_points: int) -> tuple[int, ...]:
    """The permutation that swaps each pair and leaves the others, as ``LandmarkLayout.flip``.

    Raises ValueError where a landmark is not there, stands in two pairs, or is paired with itself.
    """
    flip, seen = list(range(num_points)), set()
    for pair in pairs:
        left, right = pair
        for number in pair:
            if not 0 <= number < num_points:
                raise ValueError(
                    f"pairs: expected landmarks 0..{num_points - 1}, got {left}-{right}"
                )
            if number in seen or left == right:
                raise ValueError(
                    f"pairs: expected each landmark in one pair of two, got {number} again in "
                    f"{left}-{right}"
                )
        seen.update(pair)
        flip[left], flip[right] = right, left
    return tuple(flip)


def find_layout(name: str | LandmarkLayout) -> LandmarkLayout:
    """The layout of a published set; a layout is returned as it is.

    Raises ValueError with the closest names if there is none of this name.
    """
    if isinstance(name, LandmarkLayout):
        return name
    if name in LAYOUTS:
        return LAYOUTS[name]
    raise ValueError(
        f"name: expected a set of landmarks or a LandmarkLayout, got {name!r}; "
        f"{there_are(LAYOUTS, str(name).lower())}"
    )


def _checked_flip(flip: tuple[int, ...], count: int) -> tuple[int, ...]:
    if len(flip) != count:
        raise ValueError(f"flip: expected {count} numbers, one a landmark, got {len(flip)}")
    if sorted(flip) != list(range(count)):
        raise ValueError(
            f"flip: expected a permutation of 0..{count - 1}, each landmark once, got {flip}"
        )
    for number, other in enumerate(flip):
        if flip[other] != number:
            raise ValueError(
                f"flip: expected pairs, so that mirroring twice changes nothing, got {number} -> "
                f"{other} -> {flip[other]}"
            )
    return flip


def _pairs(*runs: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Runs of pairs that close in on each other: (a, b, n) is a-b, a+1 - b-1, ... n of them."""
    return [(a + i, b - i) for a, b, n in runs for i in range(n)]


LAYOUTS: Mapping[str, LandmarkLayout] = MappingProxyType(
    {
        "300w": LandmarkLayout(
            name="300w",
            num_points=68,
            flip=flip_of_pairs(
                [
                    *_pairs((0, 16, 8), (17, 26, 5)),  # jaw, brows
                    *_pairs((31, 35, 2), (36, 45, 4), (40, 47, 2)),  # nose, eyes
                    *_pairs((48, 54, 3), (55, 59, 2), (60, 64, 2), (65, 67, 1)),  # mouth
                ],
                68,
            ),
            origin=1,
            sigma=1.0,
            outer_eye_corners=(36, 45),
            pupils=(tuple(range(36, 42)), tuple(range(42, 48))),
        ),
        "wflw": LandmarkLayout(
            name="wflw",
            num_points=98,
            flip=flip_of_pairs(
                [
                    *_pairs((0, 32, 16), (33, 46, 5), (38, 50, 4)),  # jaw, brows
                    *_pairs((55, 59, 2), (60, 72, 5), (65, 75, 3)),  # nose, eyes
                    *_pairs((76, 82, 3), (83, 87, 2), (88, 92, 2), (93, 95, 1)),  # mouth
                    *_pairs((96, 97, 1)),  # pupils
                ],
                98,
            ),
            origin=0,
            sigma=1.5,
            outer_eye_corners=(60, 72),
            pupils=((96,), (97,)),
        ),
        "cofw": LandmarkLayout(
            name="cofw",
            num_points=29,
            flip=flip_of_pairs(
                [
                    *((0, 1), (2, 3), (4, 6), (5, 7)),  # brows
                    *((8, 9), (10, 11), (12, 14), (13, 15), (16, 17)),  # eyes
                    *((18, 19), (22, 23)),  # nose, mouth
                ],
                29,
            ),
            origin=1,
            sigma=1.5,
            outer_eye_corners=(8, 9),
            pupils=((16,), (17,)),
        ),
    }
)

# Faces of each list. "full" is the test set; of 300W it is "common" and "challenge" together, and
# "test" is another one (indoor and outdoor, 300 each). WFLW's others are parts of "full".
FACES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "300w": MappingProxyType(
            {"train": 3148, "full": 689, "common": 554, "challenge": 135, "test": 600}
        ),
        "wflw": MappingProxyType(
            {
                "train": 7500,
                "full": 2500,
                "largepose": 326,
                "expression": 314,
                "illumination": 698,
                "makeup": 206,
                "occlusion": 736,
                "blur": 773,
            }
        ),
        "cofw": MappingProxyType({"train": 1345, "full": 507}),
    }
)
