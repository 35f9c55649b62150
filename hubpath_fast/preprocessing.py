"""How large an image is made before the square that a model looks at is taken from it."""

from __future__ import annotations


def resized_side(size: int) -> int:
    """Pixels a side of the resized image that parts of ``size`` are taken from: 256 for 224."""
    return round(size * 8 / 7)
