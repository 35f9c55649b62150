"""From a picture to a square crop and back: one matrix a sample moves points and reads pixels.

With annotated numbers x, a box of 200 * scale * margin pixels about its centre, a crop of S pixels
and a rotation r, counter-clockwise on screen where it is positive (landmarks.md, "Matrix"):

    x' = s R (x - centre) + S / 2,   s = S / (200 * scale * margin),   R = [[cos r, sin r],
                                                                          [-sin r, cos r]]
    mirrored afterwards, where flip is set:   x'' = (S - x', y')

Annotated numbers have an origin: source pixel (column j, row i) has its centre at (j + origin,
i + origin). Coordinates of a crop are continuous: pixel j covers [j, j + 1), so its centre is
j + 0.5. With S / 4 for S the matrix leads to the cells of a map in the same way.

Letters: N samples, L landmarks, C channels, H, W a source's height and width, S a crop's side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layouts import LandmarkLayout, find_layout

PIXELS_PER_SCALE = 200  # the unit of the published boxes


def box_of_points(points: Any) -> tuple[float, float, float]:
    """(scale, centre x, centre y) of a face's points [L, 2] by the rule of the published boxes.

    The box goes from floor(min) to ceil(max) of each axis; scale is its longer side / 200.

    Raises:
        ValueError: another shape, a number that is not finite, points that all lie at one place.
    """
    points = _numbers("points", points)
    if points.dim() != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points: expected [L, 2], got {list(points.shape)}")
    low, high = points.amin(dim=0).floor(), points.amax(dim=0).ceil()
    side = (high - low).max().item()
    if side <= 0:
        raise ValueError(
            f"points: expected a box with some extent, but all {len(points)} points lie at "
            f"{tuple(points[0].tolist())}"
        )
    x, y = ((low + high) / 2).tolist()
    return side / PIXELS_PER_SCALE, x, y


def crop_matrix(
    center: Any, scale: Any, rotation: Any, size: int, margin: float = 1.25, flip: Any = None
) -> Tensor:
    """Float64 [N, 2, 3]: the matrices from annotated numbers to a crop of ``size`` pixels.

    Args:
        center: [N, 2] centres of the boxes, x before y, in annotated numbers.
        scale: [N] their sides / 200, above 0.
        rotation: [N] degrees; above 0 the picture turns counter-clockwise on screen.
        size: side of the crop in pixels, or of a map in cells.
        margin: the box is this much larger than the points' own.
        flip: bool [N], which are mirrored after all that; None for none.

    Raises:
        ValueError: an argument of another shape, a number that is not finite, a scale, size or
            margin that is not above 0.
    """
    center, scale = _numbers("center", center), _numbers("scale", scale)
    rotation = _numbers("rotation", rotation)
    if center.dim() != 2 or center.shape[1] != 2:
        raise ValueError(f"center: expected [N, 2], got {list(center.shape)}")
    for name, given in (("scale", scale), ("rotation", rotation)):
        if list(given.shape) != [len(center)]:
            raise ValueError(
                f"{name}: expected [{len(center)}], one a centre, got {list(given.shape)}"
            )
    if (scale <= 0).any():
        worst = int((scale <= 0).nonzero()[0])
        raise ValueError(f"scale: expected numbers > 0, got {scale[worst].item():g} at {worst}")
    _check_size(size)
    if not 0 < margin < math.inf:
        raise ValueError(f"margin: expected a number > 0, got {margin}")
    factor = size / (PIXELS_PER_SCALE * scale * margin)
    radians = torch.deg2rad(rotation)
    a, b = factor * torch.cos(radians), factor * torch.sin(radians)
    linear = torch.stack([torch.stack([a, b], 1), torch.stack([-b, a], 1)], 1)
    shift = size / 2 - (linear @ center[:, :, None])
    matrix = torch.cat([linear, shift], 2)
    if flip is None:
        return matrix
    flip = torch.as_tensor(flip, device=matrix.device)
    if flip.dtype != torch.bool or list(flip.shape) != [len(center)]:
        raise ValueError(
            f"flip: expected bool [{len(center)}], one a centre, got {flip.dtype} "
            f"{list(flip.shape)}"
        )
    mirrored = matrix.clone()
    mirrored[:, 0] = -mirrored[:, 0]
    mirrored[:, 0, 2] += size
    return torch.where(flip[:, None, None], mirrored, matrix)


def invert(matrix: Tensor) -> Tensor:
    """[N, 2, 3] -> [N, 2, 3]: the way back, in the matrix's dtype, computed in float64.

    Raises ValueError for another shape, numbers that are not finite, and where there is none.
    """
    _check_matrix(matrix)
    full = matrix.double()
    (a, b), (c, d) = full[:, 0, :2].unbind(1), full[:, 1, :2].unbind(1)
    determinant = a * d - b * c
    if (determinant == 0).any():
        worst = int((determinant == 0).nonzero()[0])
        raise ValueError(
            f"matrix: expected one that can be inverted, got {full[worst].tolist()} at {worst}"
        )
    adjugate = torch.stack([torch.stack([d, -b], 1), torch.stack([-c, a], 1)], 1)
    linear = adjugate / determinant[:, None, None]
    return torch.cat([linear, -(linear @ full[:, :, 2:])], 2).to(matrix.dtype)


def transform_points(matrix: Tensor, points: Any) -> Tensor:
    """Points [N, L, 2] by the matrices [N, 2, 3]: [N, L, 2] in the wider of both dtypes.

    Points that are not finite stay so. Raises ValueError for other shapes.
    """
    _check_matrix(matrix)
    points = torch.as_tensor(points, device=matrix.device)
    if points.dim() != 3 or points.shape[0] != len(matrix) or points.shape[2] != 2:
        raise ValueError(
            f"points: expected [{len(matrix)}, L, 2] as matrix, got {list(points.shape)}"
        )
    dtype = torch.promote_types(matrix.dtype, points.dtype)
    # Not as a product of matrices: on a GPU that may be allowed to round to 10 bits.
    columns, points = matrix.to(dtype)[:, None], points.to(dtype)
    return columns[..., 0] * points[..., :1] + columns[..., 1] * points[..., 1:] + columns[..., 2]


def flip_points(points: Any, width: float, name: str | LandmarkLayout, origin: float = 0) -> Tensor:
    """Points [..., L, 2] of the mirrored picture: x -> width - 1 - x + 2 * origin, pairs swapped.

    Args:
        points: annotated numbers, or coordinates of a crop with ``origin=0.5``.
        width: of the picture in pixels.
        name: of a published set, or the layout.
        origin: what annotations call the centre of the first pixel.

    Raises:
        ValueError: another number of landmarks, or a layout whose pairs are not known.
    """
    layout = find_layout(name)
    points = torch.as_tensor(points)
    if points.dim() < 2 or list(points.shape[-2:]) != [layout.num_points, 2]:
        raise ValueError(
            f"points: expected [..., {layout.num_points}, 2] of {layout.name}, got "
            f"{list(points.shape)}"
        )
    if layout.flip is None:
        raise ValueError(
            f"name: {layout.name} has no pairs, so that a mirrored picture's landmarks are not "
            "known; give the layout's flip"
        )
    if not points.is_floating_point():
        points = points.double()
    mirrored = points[..., list(layout.flip), :].clone()
    mirrored[..., 0] = width - 1 + 2 * origin - mirrored[..., 0]
    return mirrored


def warp(images: Tensor, matrix: Tensor, size: int, origin: float = 0) -> Tensor:
    """Crops [N, C, size, size] of pictures [N, C, H, W], in their dtype; zeros outside.

    Pixel j of a crop is read at the inverse of j + 0.5, less ``origin``, between the four pixels
    about it. Where a crop shrinks f times or more, f a whole number >= 2, it is read from means
    over f x f pixels, so that nothing falls between. uint8 is rounded once, at the end.

    Args:
        images: uint8 or float.
        matrix: [N, 2, 3] from annotated numbers to the crop, float64 or float32.
        size: side of the crop in pixels.
        origin: what annotations call the centre of the first pixel, 0 or 1.

    Raises:
        ValueError: another shape or dtype, a matrix that cannot be inverted, a size below 1.
    """
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = list(getattr(images, "shape", [])) or type(images).__name__
        raise ValueError(f"images: expected a tensor [N, C, H, W], got {found}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images: expected uint8 or a float dtype, got {images.dtype}")
    _check_size(size)
    _check_matrix(matrix)
    if len(matrix) != len(images):
        raise ValueError(f"matrix: expected [{len(images)}, 2, 3] as images, got {len(matrix)}")
    # On the host: the windows are cut by numbers.
    inverse = invert(matrix.detach().cpu().double())
    inverse[:, :, 2] -= origin
    compute = torch.float64 if images.dtype == torch.float64 else torch.float32
    crops = images.new_zeros(len(images), images.shape[1], size, size)
    if images.requires_grad:
        return torch.stack(
            [
                _crop(i, m, size, compute).to(images.dtype)
                for i, m in zip(images, inverse, strict=True)
            ]
        )
    for crop, image, back in zip(crops, images, inverse, strict=True):
        read = _crop(image, back, size, compute)
        crop.copy_(read if images.is_floating_point() else read.round_())
    return crops


def _crop(image: Tensor, back: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """One picture [C, H, W] by ``back`` [2, 3], from a crop's coordinates to indices of pixels."""
    (a, b, e), (c, d, f) = back.tolist()
    factor = max(1, int(math.sqrt(abs(a * d - b * c)) + 1e-9))
    height, width = image.shape[1:]
    ends = ((0.5, 0.5), (0.5, size - 0.5), (size - 0.5, 0.5), (size - 0.5, size - 0.5))
    left, right = _window([a * x + b * y + e for x, y in ends], width, factor)
    top, bottom = _window([c * x + d * y + f for x, y in ends], height, factor)
    if left >= right or top >= bottom:
        return image.new_zeros(image.shape[0], size, size, dtype=dtype)
    window = _reduced(image[:, top:bottom, left:right], factor, dtype)
    # Index u of the picture is (u - left + 0.5) / factor in pixels of the window; grid_sample has
    # -1 and 1 for its edges.
    x_unit, y_unit = 2 / (factor * window.shape[2]), 2 / (factor * window.shape[1])
    steps = torch.arange(size, dtype=torch.float64) + 0.5
    across = torch.stack([a * steps * x_unit, c * steps * y_unit], 1)
    down = torch.stack(
        [(b * steps + e - left + 0.5) * x_unit - 1, (d * steps + f - top + 0.5) * y_unit - 1], 1
    )
    across, down = across.to(image.device, dtype), down.to(image.device, dtype)
    grid = across[None, None] + down[None, :, None]
    return F.grid_sample(window[None], grid, align_corners=False)[0]


def _window(reads: list[float], length: int, factor: int) -> tuple[int, int]:
    """The pixels, first and one past the last, that reads at these indices touch: whole blocks
    of ``factor`` with one more on each side, as far as the picture goes."""
    first = max(math.floor(min(reads)) - 2 * factor, 0)
    last = math.ceil(max(reads)) + 2 * factor + 1
    last = first + math.ceil((last - first) / factor) * factor
    return first, min(last, length)


def _reduced(window: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
    """Means over blocks of ``factor`` pixels, with zeros past the end of the last ones."""
    if factor == 1:
        return window.to(dtype)
    height, width = window.shape[1:]
    down, right = -height % factor, -width % factor
    if down or right:
        window = F.pad(window, (0, right, 0, down))
    # Whole rows are summed first, of uint8 as integers: a quarter of what avg_pool2d takes.
    summed = window[:, ::factor].to(_sums_of(window.dtype, factor, dtype))
    for row in range(1, factor):
        summed = summed + window[:, row::factor]
    reduced = summed[..., ::factor].to(dtype)
    for column in range(1, factor):
        reduced = reduced + summed[..., column::factor]
    return reduced.div_(factor**2)


def _sums_of(pixels: torch.dtype, factor: int, dtype: torch.dtype) -> torch.dtype:
    """What holds the sum of ``factor`` pixels."""
    if pixels != torch.uint8:
        return dtype
    return torch.int16 if 255 * factor <= torch.iinfo(torch.int16).max else torch.int32


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size: expected a whole number of pixels >= 1, got {size!r}")


def _check_matrix(matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor) or list(matrix.shape[1:]) != [2, 3] or matrix.dim() != 3:
        found = list(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"matrix: expected a tensor [N, 2, 3], got {found}")
    if not matrix.is_floating_point():
        raise ValueError(f"matrix: expected float64 or float32, got {matrix.dtype}")
    if matrix.device.type == "cpu" and not bool(torch.isfinite(matrix).all()):
        raise ValueError("matrix: expected finite numbers, got NaN or infinity")


def _numbers(name: str, value: Any) -> Tensor:
    """As float64, finite."""
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if not bool(torch.isfinite(numbers).all()):
        worst = (~torch.isfinite(numbers)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite numbers, got {numbers[tuple(worst)].item()} at {worst}"
        )
    return numbers
