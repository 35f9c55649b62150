"""The means and standard deviations that the experts' images are normalised by: checked here.

Shapes: M experts; all are in units of images in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read_normalization(
    normalization: tuple[Tensor, Tensor] | None, num_experts: int
) -> tuple[Tensor | None, Tensor | None]:
    """(mean, std) float [M, channels], or two None. Raises ValueError for other shapes, a mean
    that is not finite, and a std that is not above 0."""
    if normalization is None:
        return None, None
    mean, std = (torch.as_tensor(values) for values in normalization)
    mean, std = (
        t if t.is_floating_point() else t.to(torch.get_default_dtype()) for t in (mean, std)
    )
    if mean.shape != std.shape or mean.dim() != 2 or len(mean) != num_experts:
        raise ValueError(
            f"normalization: expected mean and std of shape [{num_experts}, channels], "
            f"got {list(mean.shape)} and {list(std.shape)}"
        )
    _check_values("normalization: mean", mean, "normalization: std", std)
    return mean, std


def normalization_rows(
    old: Tensor | None, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(mean [1, channels], std [1, channels]) of one more expert's images, where there are ``old``
    means [M, channels]; else None. Raises ValueError where one is missing, too much, or wrong."""
    if (mean is None) != (std is None) or (mean is None) != (old is None):
        raise ValueError(
            f"mean, std: the model has {'no' if old is None else 'a'} normalisation of its experts'"
            f" images, so {'leave both out' if old is None else 'give both for the new one'}"
        )
    if mean is None:
        return None
    rows = []
    for name, value in (("mean", mean), ("std", std)):
        row = torch.as_tensor(value).to(old)
        if row.shape != old.shape[1:]:
            raise ValueError(
                f"{name}: expected [{old.shape[1]}] values, got shape {list(row.shape)}"
            )
        rows.append(row[None])
    _check_values("mean", rows[0], "std", rows[1])
    return rows[0], rows[1]


def _check_values(mean_name: str, mean: Tensor, std_name: str, std: Tensor) -> None:
    if mean.is_meta or std.is_meta:  # shapes without values
        return
    for name, values, bad, allowed in (
        (mean_name, mean, ~mean.isfinite(), "finite values"),
        (std_name, std, ~(std > 0) | std.isinf(), "values above 0 that are finite"),
    ):
        if bool(bad.any()):
            wrong = int(bad.any(dim=1).nonzero()[0])
            where = f" of expert {wrong}" if len(values) > 1 else ""
            raise ValueError(f"{name}: expected {allowed}, got {values[wrong].tolist()}{where}")
