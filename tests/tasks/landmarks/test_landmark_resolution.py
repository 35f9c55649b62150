"""What a map's cells cost: the error of perfect targets, as docs/landmarks.md has it."""

from __future__ import annotations

import pytest
import torch

from hubpath_fast.tasks.landmarks.maps import decode, gaussian_targets

POINTS, SIZE = 2000, 16


@pytest.mark.parametrize(
    # Within its cell a point is anywhere: u from the middle, in -0.5..0.5 for each axis. Decoding a
    # sub-pixel bump leaves |u| - 0.25, a published one u: the mean distance is that of uniform
    # points of a square of side 0.5 or 1 from its middle, 0.3826 times the side.
    ("kind", "most", "mean"),
    [("subpixel", 0.25, 0.1913), ("published", 0.5, 0.3826)],
)
@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_perfect_targets(kind, most, mean, sigma):
    generator = torch.Generator().manual_seed(0)
    # Away from the border, where there is no quarter step.
    place = 2 + (SIZE - 4) * torch.rand(POINTS, 1, 2, generator=generator, dtype=torch.float64)
    weighted = torch.cat([place, torch.ones(POINTS, 1, 1, dtype=torch.float64)], dim=2)
    found, _ = decode(gaussian_targets(weighted, SIZE, sigma, kind))
    assert (found - place).abs().max() <= most + 1e-9
    distances = (found - place).norm(dim=2)
    # The mean of 2,000 distances whose standard deviation is below 0.15 is within 0.01 of theirs.
    assert distances.mean().item() == pytest.approx(mean, abs=0.01)
