"""The embedded task: where a digit's landmarks are, that they stay on its ink in every pose and
rendering, and that a batch is a function of (seed, step)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hubpath_fast.data import RENDERINGS, DigitsTask
from hubpath_fast.data.digits import load_scans
from hubpath_fast.tasks.landmarks.digits import (
    DIGITS_LAYOUT,
    Ink,
    InkStream,
    LandmarkDigits,
    ink_diagonals,
    soft_landmarks,
)

NAMES = list(RENDERINGS)


@pytest.fixture(scope="module")
def task():
    return LandmarkDigits(0, 100)


def one_rendering(name: str, count: int = 100) -> Ink:
    return Ink(torch.arange(count), torch.full((count,), NAMES.index(name)))


def poses() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_layout():
    assert DIGITS_LAYOUT.names == ("centre", "up", "down", "left", "right")
    assert (DIGITS_LAYOUT.num_points, DIGITS_LAYOUT.flip) == (5, None)


def test_a_landmark_is_the_formula():
    scan = load_scans()[0][17]
    found = soft_landmarks(scan[None])[0]
    for number, (dx, dy) in enumerate([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)]):
        total, x, y = 0.0, 0.0, 0.0
        for i in range(8):
            for j in range(8):
                weight = scan[i, j] * math.exp(2 * (dx * j + dy * i))
                total, x, y = total + weight, x + weight * j, y + weight * i
        assert found[number] == pytest.approx((x / total, y / total), rel=1e-12)


def test_a_single_dot_is_all_five():
    scan = np.zeros((1, 8, 8))
    scan[0, 2, 6] = 16
    assert soft_landmarks(scan) == pytest.approx(np.tile([6.0, 2.0], (1, 5, 1)))
    assert ink_diagonals(scan) == pytest.approx([math.sqrt(2)])
    scan[0, 4, 1] = 5  # ink: above 4
    scan[0, 7, 0] = 4  # none
    assert ink_diagonals(scan) == pytest.approx([math.hypot(6, 3)])


def test_landmarks_bear_a_grey_level_of_noise_in_the_ink():
    """Of the diagonal, a few percent at the 99th percentile; the hard extremes move 18.6 %."""
    scans = load_scans()[0]
    noise = np.random.RandomState(0).randint(-1, 2, scans.shape)
    noisy = np.where(scans > 0, (scans + noise).clip(0, 16), 0)

    def worst(beta: float) -> float:
        moved = soft_landmarks(noisy, beta) - soft_landmarks(scans, beta)
        share = np.linalg.norm(moved, axis=-1) / ink_diagonals(scans)[:, None]
        return np.quantile(share, 0.99)

    assert worst(2.0) == pytest.approx(0.028, abs=0.002)
    assert worst(4.0) > 0.05


def test_as_scanned_a_pixel_is_seven_wide_inside_a_margin_of_four():
    drawn = one_rendering("upright").draw()
    scans = load_scans()[0][:100]
    cells = (4 + 7 * (soft_landmarks(scans) + 0.5)) / 4
    np.testing.assert_allclose(drawn.targets[..., :2], cells, rtol=1e-6)
    units = 7 * ink_diagonals(scans) / 4
    np.testing.assert_allclose(drawn.targets[..., 3], np.tile(units[:, None], 5), rtol=1e-6)
    assert (drawn.targets[..., 2] == 1).all()
    upright = DigitsTask(0, size=64).rendered("test", "upright").images
    assert upright.shape == (797, 3, 64, 64)
    assert (upright[..., :4] == 0).all()


def ink_centres(images: torch.Tensor) -> torch.Tensor:
    """Grey images [n, S, S] -> [n, 2], x and y in cells of four pixels."""
    grey = images.double()
    places = (torch.arange(grey.shape[-1]).double() + 0.5) / 4
    total = grey.sum((1, 2))
    return torch.stack([(grey.sum(1) @ places), (grey.sum(2) @ places)], 1) / total[:, None]


@pytest.mark.parametrize("pose", [None, "drawn"])
@pytest.mark.parametrize("rendering", ["upright", "inverted", "turned"])
def test_the_centre_stays_the_centre_of_the_ink(rendering, pose):
    """An independent measure of the drawn pixels. The scan's enlargement moves a centre by up to
    0.06 cells; where a digit leaves the picture, its ink does too."""
    drawn = one_rendering(rendering).draw(pose and poses())
    grey = drawn.images[:, 0]
    grey = 255 - grey if rendering == "inverted" else grey
    border = torch.ones(64, 64, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    whole = (grey[:, border] == 0).all(dim=1)
    assert whole.sum() > 30
    off = ink_centres(grey[whole]) - drawn.targets[whole, 0, :2]
    assert off.abs().max() < 0.1


def test_a_quarter_turn_carries_the_points_and_the_pixels():
    upright, turned = (one_rendering(name).draw(poses()) for name in ("upright", "turned"))
    assert torch.equal(turned.images, upright.images.rot90(1, (2, 3)))
    x, y, weight, unit = upright.targets.unbind(-1)
    expected = torch.stack([y, 16 - x, weight, unit], -1)
    torch.testing.assert_close(turned.targets, expected, rtol=0, atol=2e-6)
    for name in ("inverted", "edges", "checkerboard"):
        assert torch.equal(one_rendering(name).draw(poses()).targets, upright.targets)


def test_backgrounds_stay_whole():
    board = one_rendering("checkerboard").draw(poses()).images[:, 0]
    squares = torch.arange(64) // 8
    bright = (squares[:, None] + squares) % 2 == 1
    assert (board[:, bright] >= 160).all()
    ink = one_rendering("upright").draw(poses()).images[:, 0]
    assert torch.equal(board[:, ~bright], ink[:, ~bright])
    assert (one_rendering("inverted").draw(poses()).images[:, 0] == 255 - ink).all()


def test_poses_are_as_wide_as_they_say(task):
    ink = Ink(torch.arange(1797), torch.zeros(1797, dtype=torch.int64))
    still, moved = ink.draw(), ink.draw(poses())
    factor = moved.targets[:, 0, 3] / still.targets[:, 0, 3]
    assert factor.min() >= 0.75
    assert factor.max() < 1.25
    assert factor.mean() == pytest.approx(1, abs=0.02)
    up = [drawn.targets[:, 1, :2] - drawn.targets[:, 2, :2] for drawn in (still, moved)]
    angles = [torch.atan2(axis[:, 1], axis[:, 0]).rad2deg() for axis in up]
    turn = (angles[1] - angles[0] + 180) % 360 - 180
    assert turn.abs().max() < 30
    assert (turn.abs() > 1e-3).double().mean() == pytest.approx(0.6, abs=0.04)
    # About the middle, cell 8: what is left of a point there is the shift, 6 % of 16 cells.
    middle = moved.targets[:, 0, :2] - 8
    radians, offset = turn.deg2rad(), still.targets[:, 0, :2] - 8
    cos, sin = radians.cos(), radians.sin()
    x = factor * (cos * offset[:, 0] - sin * offset[:, 1])
    y = factor * (sin * offset[:, 0] + cos * offset[:, 1])
    shift = middle - torch.stack([x, y], 1)
    assert shift.abs().max() < 0.96 + 1e-3
    assert shift.abs().mean() == pytest.approx(0.48, abs=0.03)
    inside = ((moved.targets[..., :2] >= 0) & (moved.targets[..., :2] < 16)).all(-1)
    assert torch.equal(moved.targets[..., 2], inside.float())
    assert (~inside).any()


def test_the_split_is_that_of_the_classification(task):
    plain = DigitsTask(0, 100)
    for name, count in (("target", 200), ("validation", 100), ("test", 797)):
        found = getattr(task, name)
        assert found.images.shape == (count, 3, 64, 64)
        assert found.targets.shape == (count, 5, 4)
        assert found.targets.dtype == torch.float32
        assert torch.equal(found.renderings, getattr(plain, name).renderings)
    assert task.ink.indices.tolist() == plain.indices["target"].tolist()
    assert torch.equal(LandmarkDigits(0).test.images, task.test.images)
    assert not torch.equal(LandmarkDigits(1).test.targets, task.test.targets)
    assert not torch.equal(task.test.targets, task._ink("test").draw().targets)


def test_a_batch_is_a_function_of_seed_and_step(task):
    stream = InkStream(task.ink, 16, seed=5)
    seven = [batch for batch, _ in zip(stream.batches(), range(8), strict=False)][7]
    again = next(InkStream(task.ink, 16, seed=5).batches(7))
    assert torch.equal(seven[0], again[0])
    assert torch.equal(seven[1], again[1])
    assert seven[0].shape == (16, 3, 64, 64)
    others = InkStream(task.ink, 16, seed=6).batch(7), stream.batch(8)
    assert all(not torch.equal(seven[1], targets) for _, targets in others)
    # The same digit, an epoch of 200 later, in another pose.
    small = Ink(task.ink.indices[:1], task.ink.renderings[:1])
    one = InkStream(small, 1)
    assert not torch.equal(one.batch(0)[1], one.batch(1)[1])


def test_the_mean_shape_is_upright(task):
    shape = task.mean_shape()
    assert shape.shape == (5, 2)
    scans = load_scans()[0][task.ink.indices.numpy()]
    expected = (4 + 7 * (soft_landmarks(scans).mean(axis=0) + 0.5)) / 4
    np.testing.assert_allclose(shape, expected, rtol=1e-6)
    assert shape[1, 1] < shape[0, 1] < shape[2, 1]  # up, centre, down
