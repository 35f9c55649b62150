"""Small image sets that live in memory: the set, its stateless training stream, its evaluation.

Shapes: n images in the set, B images a batch, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel.share import Share
from .order import Places, SampleOrder, generator, shared_batches


@dataclass(frozen=True, eq=False)
class TensorSet:
    """Images in memory.

    images: uint8 [n, 3, H, W]. targets: [n, ...], of classes int64 [n]. classes: their names.
    renderings: int64 [n], which way each image was drawn (an index into ``rendering_names``), or
    None where that means nothing.
    """

    images: Tensor
    targets: Tensor
    classes: tuple[str, ...] = ()
    renderings: Tensor | None = None
    rendering_names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(
                f"images: expected torch.uint8 [n, 3, H, W], got {self.images.dtype} "
                f"{list(self.images.shape)}"
            )
        if self.targets.shape[:1] != self.images.shape[:1]:
            raise ValueError(
                f"targets: expected [{len(self.images)}, ...], one an image, got "
                f"{list(self.targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def subset(self, indices: Tensor) -> TensorSet:
        """The images at ``indices`` (int64 or bool), in that order."""
        kept = {"images": self.images[indices], "targets": self.targets[indices]}
        if self.renderings is not None:
            kept["renderings"] = self.renderings[indices]
        return dataclasses.replace(self, **kept)


def affine(
    images: Tensor,
    generator: torch.Generator,
    rotation: float = 10.0,
    translation: float = 0.08,
    scale: float = 0.1,
    places: Places | None = None,
) -> Tensor:
    """Turns, shifts and scales each image by its own small amount, drawn uniformly.

    images: uint8 [B, C, H, W] on any device. generator: a CPU generator, so that the draw is the
    same on every device. rotation: at most that many degrees either way. translation: at most that
    share of the image's side. scale: a factor in [1 - scale, 1 + scale]. What enters from outside
    is the image mirrored at its border, which keeps backgrounds that are bright or patterned whole.
    places: where the images stand in the batch, if they are a part of one: they get what they get
    in the whole of it.

    Returns uint8 [B, C, H, W], bilinear, rounded once.
    """
    count = len(images) if places is None else places.size
    draw = torch.rand(count, 4, generator=generator) * 2 - 1  # [B, 4] in [-1, 1)
    if places is not None:
        draw = draw[places.held]
    angle = draw[:, 0] * math.radians(rotation)
    factor = 1 + draw[:, 1] * scale
    shift = draw[:, 2:] * (2 * translation)  # grid_sample's coordinates: a side is 2 long
    cos, sin = angle.cos() / factor, angle.sin() / factor
    height, width = images.shape[-2:]
    matrix = torch.stack(
        [
            torch.stack([cos, -sin * height / width, shift[:, 0]], dim=1),
            torch.stack([sin * width / height, cos, shift[:, 1]], dim=1),
        ],
        dim=1,
    ).to(images.device)  # [B, 2, 3], where in the old image each new pixel is read
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return moved.round_().clamp_(0, 255).to(torch.uint8)


class TensorStream:
    """Endless, stateless training batches of a ``TensorSet``.

    The batch of step s is a function of (seed, s) alone: its samples by ``SampleOrder``, its
    augmentation by a generator of (seed, s).

    data: the set. batch_size: B. seed: any integer. augment: apply ``affine`` or not. device: where
    the images are kept and the batches are made; None: where the set is. mixing: (images, targets,
    step) -> (images, targets), applied last, such as ``Mixing``. share: of a batch what is yielded;
    ``mixing`` is then also given ``Places`` of the images and of their partners.
    """

    def __init__(
        self,
        data: TensorSet,
        batch_size: int,
        seed: int = 0,
        augment: bool = True,
        device: torch.device | str | None = None,
        mixing: Callable[..., tuple[Tensor, Tensor]] | None = None,
        share: Share = Share(),
    ):
        self.order = SampleOrder(len(data), batch_size, seed)
        self.seed, self.augment, self.mixing = seed, augment, mixing
        self.places = Places.of(share, batch_size, pairs=mixing is not None)
        device = data.images.device if device is None else torch.device(device)
        self.images, self.targets = data.images.to(device), data.targets.to(device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """images uint8 [B, 3, H, W] and targets [B, ...] of one step, or what ``mixing`` makes of
        them; of a share its own of these B."""
        indices, places = self.order.indices(step), self.places
        if places is not None:
            indices = indices[places.held]
        indices = indices.to(self.images.device)
        images, targets = self.images[indices], self.targets[indices]
        if self.augment:
            images = affine(images, generator(self.seed, "affine", step), places=places)
        if self.mixing is not None:
            at = () if places is None else (places,)
            images, targets = self.mixing(images, targets, step, *at)
        if places is not None:
            images, targets = places.own(images), places.own(targets)
        return images, targets

    def batches(self, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps start_step, start_step + 1, ... without end."""
        for step in count(start_step):
            yield self.batch(step)


class TensorBatches:
    """A ``TensorSet`` in its own order, each image once; may be iterated any number of times.

    Yields images uint8 [<= B, 3, H, W] and targets [<= B, ...]. share: of each batch what is
    yielded; one without a sample of its own yields one image and no target, see ``shared_batches``.
    """

    def __init__(
        self,
        data: TensorSet,
        batch_size: int = 256,
        device: torch.device | str | None = None,
        share: Share = Share(),
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size}")
        self.data, self.batch_size = data, batch_size
        self.device = data.images.device if device is None else torch.device(device)
        self._parts = shared_batches(len(data), batch_size, share)

    @property
    def num_samples(self) -> int:
        return len(self.data)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part, counted in self._parts:
            images = self.data.images[part.start : part.stop]
            targets = self.data.targets[part.start : part.start + counted]
            yield images.to(self.device), targets.to(self.device)
