"""Float32 as float32: without TF32, which a GPU's convolutions use unless they are told not to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within, products and convolutions of float32 keep all its bits; then flags are as before.

    TF32 has ten bits of mantissa: fifty layers of it are 1e-2 from float64, where a check allows
    2e-3. Set by the older names of the flags alone: torch refuses to tell one that was set by both.
    """
    owners = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [owner.allow_tf32 for owner in owners]
    for owner in owners:
        owner.allow_tf32 = False
    try:
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.allow_tf32 = value
