"""Memory for many tensors, asked for at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: of each tensor, as torch's allocator aligns those that it makes
LARGE = 1 << 20  # bytes: of a tensor that gets memory of its own


class Slab:
    """Makes new tensors like given ones, the small ones with one allocation for each dtype.

    An allocation on a GPU costs the host some 5 us, and a network has hundreds of gradients; a view
    costs a fraction of that. The memory of the small ones is freed with the last of them, and saved
    with each: large ones, which are few and hold most of it, have their own.
    """

    def __init__(self, like: Iterable[Tensor]):
        self._like: list[tuple[torch.dtype, torch.Size, tuple[int, ...], int | None]] = []
        self._elements: dict[torch.dtype, int] = {}
        for tensor in like:
            dense = torch.empty_like(tensor, device="meta")  # its strides, were it made new
            if dense.nbytes >= LARGE:
                self._like.append((dense.dtype, dense.shape, dense.stride(), None))
                continue
            start = self._elements.get(dense.dtype, 0)
            self._like.append((dense.dtype, dense.shape, dense.stride(), start))
            step = ALIGNMENT // dense.element_size()
            self._elements[dense.dtype] = start + -(-dense.numel() // step) * step

    def new(self, device: torch.device) -> list[Tensor]:
        """Uninitialised tensors, of the shapes, dtypes and strides of the given ones."""
        memory = {
            dtype: torch.empty(elements, dtype=dtype, device=device)
            for dtype, elements in self._elements.items()
        }
        return [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            if start is None
            # As data: each has its own count of versions, as a tensor that was made by itself.
            else memory[dtype].as_strided(shape, stride, start).data
            for dtype, shape, stride, start in self._like
        ]
