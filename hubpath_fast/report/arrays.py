"""Arguments of the figures: arrays in, numpy out, or a ValueError that says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..measure import Measure

FRACTION = Measure("fraction", "max", (0.0, 1.0))


def to_array(argument: str, value: Any) -> np.ndarray:
    """A numpy array of a tensor (any device), an array or nested lists."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has no such type
            value = value.float()
        return value.numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{argument} is ragged ({error}); give rows of equal length") from error


def to_matrix(argument: str, value: Any) -> np.ndarray:
    """float64 [rows, columns], at least one of each; None in lists becomes NaN."""
    array = to_array(argument, value)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{argument} has shape {list(array.shape)}; give a matrix [rows, columns] with at "
            "least one of each"
        )
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} holds what is not a number ({error})") from error


def to_names(argument: str, value: Sequence[Any], count: int, of: str) -> list[str]:
    """``count`` names as strings; ``of`` says what each is the name of, for the message."""
    names = [value] if isinstance(value, str) else [str(name) for name in value]
    if len(names) != count:
        raise ValueError(
            f"{argument} has {len(names)} entries, but there are {count} {of}; give one for each"
        )
    return names


def to_points(argument: str, value: Any) -> np.ndarray:
    """float64 [n, 2, P, 2]: P true and P predicted points (x, y) on each of n images."""
    array = to_array(argument, value).astype(np.float64)
    if array.ndim != 4 or array.shape[1::2] != (2, 2) or not array.size or np.isnan(array).any():
        raise ValueError(
            f"{argument} has shape {list(array.shape)} ({int(np.isnan(array).sum())} of its "
            "numbers NaN); give numbers [n, 2, P, 2], true and predicted points of each image"
        )
    return array


def to_fractions(argument: str, values: np.ndarray) -> np.ndarray:
    """The values, when all lie in 0..1 (NaN passes; 1e-6 is allowed for rounding)."""
    return to_limits(argument, values, FRACTION)


def to_limits(argument: str, values: Any, measure: Measure) -> Any:
    """The values, when all are such as the measure can be (likewise)."""
    low, high = (
        bound if limit is None else limit
        for limit, bound in zip(measure.limits, (-np.inf, np.inf), strict=True)
    )
    array = np.asarray(values)
    wrong = array[(array < low - 1e-6) | (array > high + 1e-6)]
    if wrong.size:
        raise ValueError(
            f"{argument}: expected {measure.name} in {low:g}..{high:g}, got {wrong.flat[0]:g}"
        )
    return values
