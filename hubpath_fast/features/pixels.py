"""The images of a shelf as its models see them: decoded once for each size, cut as views.

An image is decoded and resized to the square that every transform begins with, and all models of a
size cut their views from that. The squares lie in a file that is mapped, while there are models to
compute that need them. View 0 is the crop of evaluation; the others are random crops as training
makes them, a function of (seed, view, image).

Files are known by their contents, not by their times, which copies change: whenever images are
decoded, their SHA-256 must be what it was at the first time, so that all features of a shelf are
of the same images. Their bytes are in the page cache at that moment, and a hash is a small part of
a decode.

Letters: n images over all splits, V views, b of a batch, S pixels a side, Q of the square.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.tensor_file import replace_file
from ..data.augment import crop_and_resize, draw_boxes
from ..data.cache import open_squares, squares, squares_key, write_squares
from ..data.layouts import examples
from ..data.order import generator
from ..data.splits import ImageSplit, ImageSplits, Split
from ..data.transforms import square_transform
from ..preprocessing import resized_side
from .shelf import damaged

PIXELS = "pixels"  # the folder of the squares
CONTENTS = "contents.safetensors"


class Images:
    """The images of a data set, numbered over all splits: train, then validation, then test.

    sizes: images of each. targets: int64 [n].
    """

    def __init__(self, splits: ImageSplits):
        test = splits.test.subset(()) if splits.test_is_validation else splits.test
        self.parts: tuple[Split, ...] = (splits.train, splits.validation, test)
        self.sizes = tuple(len(part) for part in self.parts)
        self.targets = torch.tensor([t for part in self.parts for t in part.targets]).long()
        self._places = [(part, i) for part in self.parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def load(self, number: int) -> Image.Image:
        """Decodes one; DataError if it is broken."""
        part, index = self._places[number]
        return part.load(index)

    def contents(self, number: int) -> bytes:
        """The SHA-256 of the file, or of the pixels of what lies in no file."""
        part, index = self._places[number]
        if isinstance(part, ImageSplit):
            return hashlib.sha256(part.paths[index].read_bytes()).digest()
        return hashlib.sha256(part.load(index).tobytes()).digest()

    def name(self, number: int) -> str:
        part, index = self._places[number]
        return str(part.paths[index]) if isinstance(part, ImageSplit) else f"image {number}"

    def key(self, side: int) -> str:
        """Tells sets of images apart, without decoding any."""
        if all(isinstance(part, ImageSplit) for part in self.parts):
            return squares_key([path for part in self.parts for path in part.paths], side)
        return hashlib.sha256(b"".join(map(self.contents, range(len(self))))).hexdigest()[:24]


@dataclass(frozen=True)
class Views:
    """How views are cut. count: V. seed, flip, min_area: of the random ones, see ``RandomCrops``.
    num_images: n."""

    count: int
    num_images: int
    seed: int = 0
    flip: bool = True
    min_area: float = 0.08

    def cut(self, pixels: Tensor, start: int, view: int, size: int) -> Tensor:
        """Images ``start``, ``start + 1``, ... as a view shows them, uint8 [b, 3, S, S].

        pixels: their squares, uint8 [b, Q, Q, 3].
        """
        return self.cut_and_resize(pixels, start, view, size, size)

    def cut_and_resize(self, pixels: Tensor, start: int, view: int, of: int, size: int) -> Tensor:
        """The same crops of models at ``of`` pixels a side, resized to ``size``."""
        count, side = pixels.shape[:2]
        images = pixels.permute(0, 3, 1, 2)
        if view == 0:
            first = round((side - of) / 2)  # as torchvision's CenterCrop
            if of == size:
                return images[:, :, first : first + of, first : first + of]
            boxes = torch.tensor([[first, first, of, of]]).expand(count, 4)
            return crop_and_resize(images, boxes, torch.zeros(count, dtype=torch.bool), size)
        boxes, flipped = _draws(self, view, side)
        end = start + count
        return crop_and_resize(images, boxes[start:end], flipped[start:end], size)


def router_transform(crop: int, size: int) -> Callable[[Image.Image], Tensor]:
    """Decoded image -> uint8 [3, size, size]: what a router that learned on a shelf's view 0 looks
    at. crop: pixels a side of the crop that is resized; see ``Views.cut_and_resize``."""
    square, views = square_transform(crop), Views(1, 1)

    def transform(image: Image.Image) -> Tensor:
        pixels = square(image).permute(1, 2, 0)[None]
        return views.cut_and_resize(pixels, 0, 0, crop, size)[0]

    return transform


@lru_cache(maxsize=16)  # all models of a size have the same
def _draws(views: Views, view: int, side: int) -> tuple[Tensor, Tensor]:
    """Boxes [n, 4] in squares, and which images are mirrored [n]."""
    draw = generator(views.seed, "view", view)
    boxes = draw_boxes(views.num_images, (side, side), views.min_area, draw)
    return boxes, torch.rand(views.num_images, generator=draw) < (0.5 if views.flip else 0)


class Squares:
    """The squares of a shelf's images, of one size after another.

    folder: the shelf. stop: is asked between images, and raises to stop. decodes: how many images
    were decoded.
    """

    def __init__(self, folder: Path, images: Images, stop: Callable[[], None] = lambda: None):
        self.folder, self.images, self.stop = folder, images, stop
        self.decodes = 0

    def open(self, size: int) -> Tensor:
        """uint8 [n, Q, Q, 3], mapped, of models at ``size`` pixels a side.

        Raises DataError of a broken image; ValueError of images whose contents have changed;
        OSError of a full disk.
        """
        side = resized_side(size)
        path = self.folder / PIXELS / f"{side}-{self.images.key(side)}.npy"
        shape = (len(self.images), side, side, 3)
        known = (self.folder / CONTENTS).exists()
        if not known or open_squares(path, shape) is None:
            hashes: list[bytes] = [b""] * len(self.images)

            def load(number: int) -> Image.Image:
                self.stop()
                hashes[number] = self.images.contents(number)
                return self.images.load(number)

            def compared() -> Iterator[np.ndarray]:
                yield from squares(range(len(self.images)), side, load)
                self._compare(hashes)  # before the file has its name: what is found is as it was

            write_squares(path, shape, compared())
            self.decodes += len(self.images)
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))

    def drop(self) -> None:
        """Deletes the files of all sizes."""
        place = self.folder / PIXELS
        for path in place.glob("*"):
            path.unlink()
        if place.is_dir():
            place.rmdir()

    def _compare(self, hashes: Sequence[bytes]) -> None:
        """With those of the first time, which are kept."""
        now = torch.from_numpy(np.frombuffer(b"".join(hashes), dtype=np.uint8).copy()).view(-1, 32)
        place = self.folder / CONTENTS
        if not place.exists():
            replace_file(place, {"sha256": now})
            return
        try:
            with safe_open(place, framework="pt") as file:
                kept = file.get_tensor("sha256")
            changed = (kept != now).any(dim=1).nonzero()[:, 0].tolist()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise damaged(place, str(error)) from error
        if changed:
            names = [self.images.name(number) for number in changed]
            raise ValueError(
                f"{len(changed)} of the {len(now)} images have other contents than when the first "
                f"features of {self.folder} were computed: {examples(names)}; restore them, or "
                "make a new shelf"
            )
