"""How far predicted points are from the true ones.

    NME of a face = 1/L * sum over landmarks of |prediction - truth| / unit

A unit is a distance in the same face, and numbers with different units cannot be compared: the
distance of the outer eye corners ("ocular", what the paper's table 3 has), that of the pupils
("pupil"), the diagonal of the box around the points ("diagonal"), or the distance of any two
landmarks ("I-J").

Letters: N faces, L landmarks. Errors are shares, not percent, in float64.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..._checks import is_finite_number
from .layouts import LandmarkLayout, find_layout

UNITS = ("ocular", "pupil", "diagonal")


def nme(prediction: Any, truth: Any, unit: Any) -> Tensor:
    """Float64 [N]: the mean error of each face over its landmarks, as a share of its unit.

    Args:
        prediction, truth: [N, L, 2], in any one system of coordinates.
        unit: [N], in the same; a crop's or a map's, if it only scales, turns and shifts.

    Raises:
        ValueError: other shapes, no landmarks, a unit that is not a finite number above 0.
    """
    truth = _points("truth", truth)
    prediction = _points("prediction", prediction).to(truth.device)
    unit = torch.as_tensor(unit, dtype=torch.float64, device=truth.device)
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction: expected {list(truth.shape)} as truth, got {list(prediction.shape)}"
        )
    if list(unit.shape) != [len(truth)]:
        raise ValueError(f"unit: expected [{len(truth)}], one a face, got {list(unit.shape)}")
    if not truth.shape[1]:
        raise ValueError("truth: expected at least one landmark, got none")
    _check_units(unit, "unit")
    return (prediction - truth).norm(dim=2).mean(dim=1) / unit


def failure_rate(errors: Any, threshold: float = 0.10) -> float:
    """The share of faces whose error is larger than the threshold; NaN counts as a failure.

    Raises ValueError without faces, or for a threshold that is not above 0.
    """
    errors = _errors(errors, threshold)
    # In the errors' own dtype, in which 0.10 is not larger than 0.10.
    return (~(errors <= threshold)).double().mean().item()


def auc(errors: Any, threshold: float = 0.10) -> float:
    """The area under the cumulative error curve up to the threshold, as a share of the whole.

    The curve is a staircase, so the area is the mean of max(0, 1 - error / threshold), exactly. A
    NaN counts as a failure. Raises as ``failure_rate``.
    """
    errors = _errors(errors, threshold)
    return (1 - errors.double() / threshold).clamp_min(0).nan_to_num(nan=0.0).mean().item()


def normalizer(truth: Any, name: str | LandmarkLayout, how: str = "ocular") -> Tensor:
    """Float64 [N]: what the errors of each face are divided by, in the truth's own measure.

    Args:
        truth: [N, L, 2].
        name: of a published set, or the layout.
        how: "ocular", "pupil", "diagonal", or two landmarks' numbers as "I-J".

    Raises:
        ValueError: another number of landmarks, a unit that the layout does not have, or a face
            where it is 0, as with eye corners that coincide: which.
    """
    layout = find_layout(name)
    truth = _points("truth", truth)
    if truth.shape[1] != layout.num_points:
        raise ValueError(
            f"truth: expected [N, {layout.num_points}, 2] of {layout.name}, got {list(truth.shape)}"
        )
    if how == "diagonal":
        distance = (truth.amax(dim=1) - truth.amin(dim=1)).norm(dim=1)
    else:
        one, other = unit_landmarks(layout, how)
        first, second = truth[:, list(one)].mean(dim=1), truth[:, list(other)].mean(dim=1)
        distance = (first - second).norm(dim=1)
    _check_units(distance, f'unit "{how}"')
    return distance


def unit_landmarks(layout: LandmarkLayout, how: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The landmarks whose two means are as far apart as the unit "ocular", "pupil" or "I-J".

    Raises ValueError for a unit that the layout does not have, naming those that it has.
    """
    corners = layout.outer_eye_corners
    if how == "ocular" and corners is not None:
        return (corners[0],), (corners[1],)
    if how == "pupil" and layout.pupils is not None:
        return layout.pupils
    numbers = re.fullmatch(r"(\d+)-(\d+)", str(how))
    if numbers:
        first, second = int(numbers[1]), int(numbers[2])
        if first != second and max(first, second) < layout.num_points:
            return (first,), (second,)
        raise ValueError(
            f"unit: expected two of the landmarks 0..{layout.num_points - 1} of {layout.name} as "
            f'"I-J", got "{how}"'
        )
    there = {"ocular": corners, "pupil": layout.pupils, "diagonal": True}
    known = [f'"{unit}"' for unit in UNITS if there[unit]]
    raise ValueError(
        f'unit: {layout.name} has {", ".join(known)} and "I-J", the distance of two landmarks, '
        f'got "{how}"'
    )


def _points(name: str, value: Any) -> Tensor:
    points = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    if points.dim() != 3 or points.shape[2] != 2:
        raise ValueError(f"{name}: expected [N, L, 2], got {list(points.shape)}")
    return points.double()


def _errors(errors: Any, threshold: float) -> Tensor:
    if not isinstance(errors, Tensor):
        errors = torch.as_tensor(errors, dtype=torch.float64)
    if errors.dim() != 1 or not len(errors):
        raise ValueError(f"errors: expected [N], at least one face, got {list(errors.shape)}")
    if not (is_finite_number(threshold) and threshold > 0):
        raise ValueError(f"threshold: expected a share > 0, 0.10 for 10 %, got {threshold!r}")
    return errors


def _check_units(unit: Tensor, name: str) -> None:
    """Raises ValueError for the first face that has no length to divide by."""
    bad = ~((unit > 0) & torch.isfinite(unit))
    if bad.any():
        faces = bad.nonzero()[:, 0].tolist()
        more = f" (and {len(faces) - 1} more)" if len(faces) > 1 else ""
        raise ValueError(
            f"{name}: expected a length > 0 in every face, got {unit[faces[0]].item():g} in face "
            f"{faces[0]}{more}; its landmarks coincide or are not numbers"
        )
