"""Frames as patches, so that two convolutions whose windows do not overlap are matrix products.

A convolution of p x p pixels and stride p cuts a frame into cells of p x p; one of q x q and stride
q after it cuts the cells into blocks of q x q. A frame is stored as

    packed[block * q * q + cell of the block, pixel of the cell]

blocks, cells and pixels each row by row. Of a frame of 84 x 84 with p = q = 5 that is [225, 25]: 9
blocks of 25 cells of 25 pixels. Rows and columns 75..83 are in no whole block: the second
convolution never sees them, and they are not kept, which also saves a fifth of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Frames = TypeVar("Frames", Tensor, np.ndarray)


class FramePatches:
    """How frames of one shape are packed.

    Args:
        frame_shape: (height, width) in pixels.
        patches: sides of the windows of the first convolution, in pixels, and of the second, in
            cells: (p, q).

    Attributes:
        shape: of a packed frame, (blocks * q * q, p * p).
        blocks: how many blocks there are, (down, across).
        kept: pixels that are seen, (height, width), from the top left.

    Raises:
        ValueError: sides that are no positive integers; a frame smaller than one block; sides with
            which a packed frame would have the shape of a plain one.
    """

    def __init__(self, frame_shape: Sequence[int] = (84, 84), patches: Sequence[int] = (5, 5)):
        self.frame_shape = check_sizes("frame_shape", frame_shape, 2)
        self.patches = check_sizes("patches", patches, 2)
        p, q = self.patches
        self.blocks = tuple(side // (p * q) for side in self.frame_shape)
        if 0 in self.blocks:
            raise ValueError(
                f"frame_shape: expected at least {p * q} x {p * q} pixels, one block of {q} x {q} "
                f"cells of {p} x {p} pixels, got {' x '.join(map(str, self.frame_shape))}; take "
                "smaller patches"
            )
        self.kept = tuple(count * p * q for count in self.blocks)
        self.shape = (self.blocks[0] * self.blocks[1] * q * q, p * p)
        if self.shape == self.frame_shape:
            raise ValueError(
                f"patches: packed by {self.patches}, a frame of {list(self.frame_shape)} has the "
                "same shape as before, and the two could not be told apart; take others"
            )

    def pack(self, frames: Frames) -> Frames:
        """[..., height, width] -> [..., *shape], of the same type and dtype; always a copy."""
        self._check(frames, self.frame_shape, "frames")
        (p, q), (down, across) = self.patches, self.blocks
        lead = frames.shape[:-2]
        seen = frames[..., : self.kept[0], : self.kept[1]]
        split = seen.reshape(*lead, down, q, p, across, q, p)
        return _inner(split, (0, 3, 1, 4, 2, 5)).reshape(*lead, *self.shape)

    def unpack(self, packed: Frames) -> Frames:
        """[..., *shape] -> [..., height, width], with zeros where nothing was kept."""
        self._check(packed, self.shape, "packed")
        (p, q), (down, across) = self.patches, self.blocks
        lead = packed.shape[:-2]
        split = packed.reshape(*lead, down, across, q, q, p, p)
        seen = _inner(split, (0, 2, 4, 1, 3, 5)).reshape(*lead, *self.kept)
        if isinstance(packed, Tensor):
            frames = packed.new_zeros(*lead, *self.frame_shape)
        else:
            frames = np.zeros((*lead, *self.frame_shape), packed.dtype)
        frames[..., : self.kept[0], : self.kept[1]] = seen
        return frames

    def __repr__(self) -> str:
        return f"FramePatches(frame_shape={self.frame_shape}, patches={self.patches})"

    @staticmethod
    def _check(frames: Frames, shape: tuple[int, int], name: str) -> None:
        if not isinstance(frames, (Tensor, np.ndarray)) or tuple(frames.shape[-2:]) != shape:
            found = list(frames.shape) if hasattr(frames, "shape") else type(frames).__name__
            raise ValueError(
                f"{name}: expected [..., {shape[0]}, {shape[1]}] of torch or numpy, got {found}"
            )


def check_sizes(name: str, sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` integers of at least 1 as a tuple; ValueError for anything else."""
    found = tuple(sizes) if isinstance(sizes, Sequence) and not isinstance(sizes, str) else ()
    if len(found) != count or any(type(size) is not int or size < 1 for size in found):
        raise ValueError(f"{name}: expected {count} integers of at least 1, got {sizes!r}")
    return found


def _inner(split: Frames, order: tuple[int, ...]) -> Frames:
    """A copy with the last six dimensions in another order."""
    lead = split.ndim - len(order)
    order = (*range(lead), *(lead + i for i in order))
    if isinstance(split, Tensor):
        return split.permute(order).clone(memory_format=torch.contiguous_format)
    return split.transpose(order).copy()
