"""A real task that ships with scikit-learn, on which routing pays: digits in five renderings.

The 1,797 handwritten digits of ``sklearn.datasets.load_digits`` (8 x 8 pixels, 17 grey levels) are
drawn at S x S in five ways, S = 32 as a rule. Each expert of a hub is pre-trained on one rendering
of 700 digits; the target task is 300 other digits, each in one of the five renderings, and 797 more
test it. So every expert knows digits, but each image suits one expert best: what a router has to
find out.

All pixels come from integer arithmetic or from float64 that is rounded once, so a digit looks the
same on every machine. Images are uint8 [n, 3, S, S] with three equal channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .tensors import TensorSet

SIZE = 32  # pixels a side
SCAN = 8  # of them that scikit-learn's scans have; the squares of the checkerboard are as large
MARGINS = 16  # a side is that many margins: background around a digit, which touches its border
BOARD = 160  # grey level of its bright squares: below a stroke's 255, or digits would vanish
CLASSES = tuple("0123456789")

NUM_PRETRAIN, NUM_TARGET, NUM_TEST = 700, 300, 797


def inverted(images: np.ndarray) -> np.ndarray:
    """Dark on light: ``255 - upright``."""
    return 255 - images


def turned(images: np.ndarray) -> np.ndarray:
    """Turned by 90 degrees, counter-clockwise."""
    return np.rot90(images, axes=(1, 2)).copy()


def edges(images: np.ndarray) -> np.ndarray:
    """Outlines only: the length of the grey level's gradient, S / 8 times and at most 255.

    A stroke's flank rises over about a pixel of the scan, which are S / 8 here, so that this brings
    it near full brightness.
    """
    rows, columns = np.gradient(images.astype(np.float64), axis=(1, 2))
    rise = images.shape[-1] / SCAN
    return np.clip(np.rint(rise * np.hypot(rows, columns)), 0, 255).astype(np.uint8)


def checkerboard(images: np.ndarray) -> np.ndarray:
    """Laid over a checkerboard; the grey level is the digit's opacity, and strokes are white."""
    size = images.shape[-1]
    square = np.arange(size) * SCAN // size
    board = np.where((square[:, None] + square[None, :]) % 2 == 1, BOARD, 0).astype(np.int64)
    light = images.astype(np.int64)
    return (light + (255 - light) * board // 255).astype(np.uint8)


# Each takes the digits as they were scanned, light on dark, uint8 [n, S, S], to the same.
RENDERINGS = {
    "upright": lambda images: images,
    "inverted": inverted,
    "turned": turned,
    "edges": edges,
    "checkerboard": checkerboard,
}


def striped(images: np.ndarray) -> np.ndarray:
    """Upright and inverted by turns, in upright stripes half a pixel of the scan wide."""
    size = images.shape[-1]
    odd = (np.arange(size) * 2 * SCAN // size) % 2 == 1
    return np.where(odd, 255 - images, images)


# Further ones, in which no image of the task is drawn: for experts that join a hub later.
EXTRA_RENDERINGS = {"striped": striped}


@lru_cache(maxsize=1)
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: grey levels 0..16, float64 [1797, 8, 8], and classes, int64 [1797]."""
    from sklearn.datasets import load_digits  # slow to import, and only the digits need it

    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


@lru_cache(maxsize=2)
def enlarged_scans(size: int = SIZE) -> np.ndarray:
    """All digits upright, uint8 [1797, S, S]."""
    small = np.rint(load_scans()[0] * (255 / 16)).astype(np.uint8)
    margin = size // MARGINS
    inner = (size - 2 * margin,) * 2
    large = [np.asarray(Image.fromarray(s).resize(inner, Image.Resampling.BILINEAR)) for s in small]
    return np.pad(np.stack(large), ((0, 0), (margin, margin), (margin, margin)))


def rendered_in(scans: np.ndarray, renderings: np.ndarray) -> torch.Tensor:
    """Digits, light on dark, in their renderings.

    scans: uint8 [n, S, S]. renderings: int [n], positions in RENDERINGS, or behind
    them in EXTRA_RENDERINGS. Returns uint8 [n, 3, S, S].
    """
    drawn = np.empty_like(scans)
    for i, draw in enumerate((RENDERINGS | EXTRA_RENDERINGS).values()):
        chosen = renderings == i
        drawn[chosen] = draw(scans[chosen])
    return torch.from_numpy(drawn)[:, None].repeat(1, 3, 1, 1)


def render(indices: np.ndarray, renderings: np.ndarray, size: int = SIZE) -> TensorSet:
    """Draws digits of scikit-learn's set.

    indices: int [n], which digits. renderings: int [n], how each is drawn, as of ``rendered_in``.
    """
    extra = EXTRA_RENDERINGS if renderings.max(initial=0) >= len(RENDERINGS) else {}
    return TensorSet(
        images=rendered_in(enlarged_scans(size)[indices], renderings),
        targets=torch.from_numpy(load_scans()[1][indices]),
        classes=CLASSES,
        renderings=torch.from_numpy(renderings.astype(np.int64)),
        rendering_names=tuple(RENDERINGS | extra),
    )


class DigitsTask:
    """One draw of the task: which digits pre-train, train and test, and how each is drawn.

    seed: any integer from 0 to 2**32 - 1; it fixes the whole task. num_validation: how many of the
    300 target digits are held out as ``validation``, to choose settings on; with 0, all 300 train.
    The 797 test digits and their renderings do not depend on ``num_validation``. In target and in
    test every rendering is drawn equally often, up to one. size: S, pixels a side.

    classes: their names. target, validation, test: TensorSets in mixed renderings; no digit is in
    two of them.
    indices: which digits are in "pretrain", "target", "validation" and "test". renderings: how each
    is drawn, of all but "pretrain".
    """

    classes = CLASSES

    def __init__(self, seed: int = 0, num_validation: int = 0, size: int = SIZE):
        if not 0 <= num_validation < NUM_TARGET:
            raise ValueError(
                f"num_validation: expected an integer in 0..{NUM_TARGET - 1}, got "
                f"{num_validation}; it is taken from the {NUM_TARGET} target digits"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed: expected an integer in 0..{2**32 - 1}, got {seed}")
        self.seed, self.size = seed, size
        # RandomState's streams are frozen for good, unlike those of numpy's newer generators.
        random = np.random.RandomState(seed)
        ends = (NUM_PRETRAIN, NUM_PRETRAIN + NUM_TARGET)
        pretrain, target, test = np.split(
            random.permutation(NUM_PRETRAIN + NUM_TARGET + NUM_TEST), ends
        )
        self.indices = {"pretrain": pretrain, "test": test}
        self.renderings = {}
        for part, indices in (("target", target), ("test", test)):
            self.renderings[part] = random.permutation(np.arange(len(indices)) % len(RENDERINGS))
        held, kept = np.split(np.arange(NUM_TARGET), [num_validation])
        self.indices |= {"target": target[kept], "validation": target[held]}
        drawn = self.renderings["target"]
        self.renderings |= {"target": drawn[kept], "validation": drawn[held]}

    @cached_property
    def target(self) -> TensorSet:
        return self._mixed("target")

    @cached_property
    def validation(self) -> TensorSet:
        return self._mixed("validation")

    @cached_property
    def test(self) -> TensorSet:
        return self._mixed("test")

    def _mixed(self, part: str) -> TensorSet:
        return render(self.indices[part], self.renderings[part], self.size)

    def rendered(self, part: str, rendering: str) -> TensorSet:
        """All digits of "pretrain", "target", "validation" or "test", in one rendering, of
        RENDERINGS or EXTRA_RENDERINGS."""
        if part not in self.indices:
            raise ValueError(f"part: expected one of {', '.join(self.indices)}, got {part!r}")
        known = list(RENDERINGS | EXTRA_RENDERINGS)
        if rendering not in known:
            raise ValueError(f"rendering: expected one of {', '.join(known)}, got {rendering!r}")
        indices = self.indices[part]
        number = known.index(rendering)
        return render(indices, np.full(len(indices), number), self.size)

    def pretrain(self, rendering: str) -> TensorSet:
        """The 700 digits that the expert of ``rendering`` is pre-trained on."""
        return self.rendered("pretrain", rendering)


def write_image_folder(task: DigitsTask, out_dir: str | Path, limit: int | None = None) -> Path:
    """Writes the task as PNG files, ``out_dir/{train,val,test}/CLASS/NUMBER_RENDERING.png``.

    train is ``task.target``; val is left out where the task holds nothing out. limit: at most that
    many images a split, the first ones. Returns out_dir.
    """
    splits = {"train": task.target, "val": task.validation, "test": task.test}
    return write_images(out_dir, splits, limit)


def write_images(
    out_dir: str | Path, splits: Mapping[str, TensorSet], limit: int | None = None
) -> Path:
    """Writes digits as PNG files, ``out_dir/SPLIT/CLASS/NUMBER_RENDERING.png``.

    limit: at most that many images a split, the first ones. Returns out_dir.
    """
    out_dir = Path(out_dir)
    for split, data in splits.items():
        for i in range(len(data) if limit is None else min(limit, len(data))):
            folder = out_dir / split / data.classes[data.targets[i]]
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{i:04d}_{data.rendering_names[data.renderings[i]]}.png"
            Image.fromarray(data.images[i, 0].numpy()).save(folder / name)
    return out_dir
