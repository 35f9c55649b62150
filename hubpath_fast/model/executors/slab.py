"""Memory for many tensors, asked for at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: of each tensor, as torch's allocator aligns those that it makes


class Slab:
    """Makes new tensors like given ones, with one allocation for each dtype.

    An allocation on a GPU costs the host some 5 us, and a network has hundreds of gradients; a view
    costs a fraction of that. The memory is freed with the last of the tensors.
    """

    def __init__(self, like: Iterable[Tensor]):
        self._like: list[tuple[torch.dtype, torch.Size, tuple[int, ...], int]] = []
        self._elements: dict[torch.dtype, int] = {}
        for tensor in like:
            dense = torch.empty_like(tensor, device="meta")  # its strides, were it made anew
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
            memory[dtype].as_strided(shape, stride, start)
            for dtype, shape, stride, start in self._like
        ]
