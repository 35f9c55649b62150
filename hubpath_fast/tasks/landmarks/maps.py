"""Targets as maps, and points out of maps.

A target is a bump of height 1 about the landmark, the product of two 1-d bumps:

    t(i, j) = weight * exp(-(i' - y)^2 / (2 sigma^2)) * exp(-(j' - x)^2 / (2 sigma^2))

"subpixel" has it about the point itself, with i' = i + 0.5 and j' = j + 0.5 the centres of the
cells. "published" is the paper's: about the cell that holds the point (y, x cut to whole cells,
i' = i, j' = j) and 0 more than 3 sigma away, so that the place within the cell is lost.

Cell j covers [j, j + 1). Letters: N samples, L landmarks, h, w a map's cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import check_float, is_finite_number
from ..._torch_ops import accumulator

KINDS = ("subpixel", "published")


def gaussian_targets(points: Tensor, size: int, sigma: float, kind: str = "subpixel") -> Tensor:
    """Maps [N, L, size, size] of points [N, L, 3], in the points' dtype and on their device.

    Args:
        points: x, y in cells of the map, and the weight that the bump is multiplied by. A point
            whose cell lies outside the map has a map of zeros.
        size: cells of a side.
        sigma: of the bump, in cells.
        kind: "subpixel" (the point itself) or "published" (its cell, cut at 3 sigma).

    Raises:
        ValueError: another shape, dtype or kind, a size below 1, a sigma that is not above 0.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size: expected a whole number of cells >= 1, got {size!r}")
    down, across = bumps(points, size, size, sigma, kind)
    return down[..., :, None] * across[..., None, :]


def bumps(
    points: Tensor, height: int, width: int, sigma: float, kind: str = "subpixel"
) -> tuple[Tensor, Tensor]:
    """The factors of the maps: [N, L, height], with the weight in it, and [N, L, width].

    Arguments and errors are those of ``gaussian_targets``.
    """
    if not isinstance(points, Tensor) or points.dim() != 3 or points.shape[2] != 3:
        found = list(points.shape) if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(f"points: expected [N, L, 3], x, y and weight, got {found}")
    check_float("points", points)
    if not (is_finite_number(sigma) and sigma > 0):
        raise ValueError(f"sigma: expected a number of cells > 0, got {sigma!r}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected {' or '.join(map(repr, KINDS))}, got {kind!r}")
    x, y, weight = points.unbind(2)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # False for NaN, too
    weight = weight.where(inside, 0.0)
    down = _bump(y.where(inside, 0.0), height, sigma, kind)
    across = _bump(x.where(inside, 0.0), width, sigma, kind)
    return weight[..., None] * down, across


def _bump(at: Tensor, cells: int, sigma: float, kind: str) -> Tensor:
    """[...] -> [..., cells]: a bump of height 1 about each position."""
    numbers = torch.arange(cells, dtype=at.dtype, device=at.device)
    if kind == "subpixel":
        return torch.exp(-((numbers + 0.5 - at[..., None]) ** 2) / (2 * sigma**2))
    away = numbers - at.floor()[..., None]
    bump = torch.exp(-(away**2) / (2 * sigma**2))
    return bump.where(away.abs() <= 3 * sigma, 0.0)


def decode(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, L, 2] in cells, x before y, and confidence [N, L] of maps [N, L, h, w].

    The cell of the maximum, the first of equals in reading order, then a quarter of a cell to the
    larger neighbour on each axis (none where they are equal), then + 0.5, the cell's centre. On the
    map's border neither axis steps. A map without anything above 0, or with a NaN, gives (0.5,
    0.5), the cell (0, 0). Confidence is the maximum itself. Both are float32, float64 of float64.

    Raises ValueError for another shape or dtype, or maps without cells.
    """
    if not isinstance(maps, Tensor) or maps.dim() != 4:
        found = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps: expected a tensor [N, L, h, w], got {found}")
    check_float("maps", maps)
    height, width = maps.shape[2:]
    if not height * width:
        raise ValueError(f"maps: expected at least one cell, got {list(maps.shape)}")
    flat = maps.detach().flatten(2)
    cell = flat.argmax(dim=2)
    confidence = flat.gather(2, cell[..., None])[..., 0]
    cell = cell.where(confidence > 0, 0)
    x, y = cell % width, cell // width
    inner = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    step_x = _step(flat, cell, 1, inner)
    step_y = _step(flat, cell, width, inner)
    dtype = accumulator(maps.dtype)
    points = torch.stack([x, y], 2).to(dtype) + 0.25 * torch.stack([step_x, step_y], 2).to(dtype)
    return points + 0.5, confidence.to(dtype)


def _step(flat: Tensor, cell: Tensor, stride: int, inner: Tensor) -> Tensor:
    """Whether the neighbour behind is larger than the one before: 1, 0 or -1; 0 unless inner."""
    last = flat.shape[2] - 1
    after = flat.gather(2, (cell + stride).clamp(max=last)[..., None])[..., 0]
    before = flat.gather(2, (cell - stride).clamp(min=0)[..., None])[..., 0]
    return ((after > before).to(torch.int8) - (after < before).to(torch.int8)).where(inner, 0)
