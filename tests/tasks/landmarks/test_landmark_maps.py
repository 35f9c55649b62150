"""Targets by a loop over cells, and points out of maps: ties, borders, empty maps."""

import math

import pytest
import torch

from hubpath_fast.tasks.landmarks import decode, gaussian_targets


def plain_target(x, y, weight, size, sigma, kind):
    """One map, cell by cell."""
    made = torch.zeros(size, size, dtype=torch.float64)
    cell_x, cell_y = math.floor(x), math.floor(y)
    if not (0 <= cell_x < size and 0 <= cell_y < size):
        return made
    for i in range(size):
        for j in range(size):
            if kind == "subpixel":
                away = (j + 0.5 - x) ** 2 + (i + 0.5 - y) ** 2
            else:
                away = (j - cell_x) ** 2 + (i - cell_y) ** 2
                if max(abs(j - cell_x), abs(i - cell_y)) > 3 * sigma:
                    continue
            made[i, j] = weight * math.exp(-away / (2 * sigma**2))
    return made


# Inside; on the border's cells; at the very edges (0 is inside, 16 is not); outside; weights.
POINTS = [
    [(5.3, 9.8, 1.0), (8.0, 8.5, 0.5), (0.2, 15.9, 1.0)],
    [(0.0, 0.0, 1.0), (16.0, 3.0, 1.0), (15.999, 3.0, 1.0)],
    [(-0.1, 4.0, 1.0), (4.0, 40.0, 1.0), (7.7, 7.7, 0.0)],
]


@pytest.mark.parametrize("sigma", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["subpixel", "published"])
def test_targets_are_the_plain_form(kind, sigma):
    points = torch.tensor(POINTS, dtype=torch.float64)
    made = gaussian_targets(points, 16, sigma, kind)
    expected = torch.stack(
        [torch.stack([plain_target(*p, 16, sigma, kind) for p in face]) for face in POINTS]
    )
    assert made.dtype == torch.float64
    assert (made - expected).abs().max() < 1e-14
    narrow = gaussian_targets(points.float(), 16, sigma, kind)
    assert narrow.dtype == torch.float32
    assert (narrow.double() - expected).abs().max() < 1e-6
    empty = (made == 0).all(dim=3).all(dim=2)
    assert empty.tolist() == [[False] * 3, [False, True, False], [True] * 3]


def test_the_published_window_is_symmetric_and_its_peak_is_its_cell():
    """Of the published code with sigma 1.5 the peak went astray where the window was cut."""
    for cell in range(16):
        points = torch.tensor([[[cell + 0.9, cell + 0.1, 1.0]]])
        made = gaussian_targets(points, 16, 1.5, "published")[0, 0]
        assert made[cell, cell] == made.max() == 1
        there = (made[cell] > 0).nonzero()[:, 0].tolist()
        assert there == list(range(max(cell - 4, 0), min(cell + 4, 15) + 1))  # 3 sigma = 4.5


def test_the_default_is_subpixel_and_zero_where_a_point_is_no_number():
    points = torch.tensor([[[3.2, 4.0, 1.0], [math.nan, 4.0, 1.0], [2.0, math.inf, 1.0]]])
    made = gaussian_targets(points, 8, 1.0)
    assert torch.equal(made, gaussian_targets(points, 8, 1.0, kind="subpixel"))
    assert made[0, 0, 3, 3] == made[0, 0, 4, 3]  # 4.0 lies between the rows 3 and 4
    assert not made[0, 1:].any()


@pytest.mark.parametrize(("kind", "bound"), [("subpixel", 0.25), ("published", 0.5)])
@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_decoding_a_target(kind, bound, sigma):
    """Within a quarter of a cell where the target knows the place in the cell, else half a one."""
    generator = torch.Generator().manual_seed(0)
    points = 1 + 62 * torch.rand(40, 50, 2, dtype=torch.float64, generator=generator)
    targets = gaussian_targets(torch.cat([points, torch.ones(40, 50, 1)], 2), 64, sigma, kind)
    found, confidence = decode(targets)
    away = (found - points).abs()
    assert away.max() <= bound
    assert away.max() > 0.9 * bound  # and no better: the bound says what is lost
    assert away.mean() == pytest.approx(bound / 2, rel=0.05)
    if kind == "published":
        assert (confidence == 1).all()
        assert torch.equal(found, points.floor() + 0.5)


def plain_decode(heat):
    """One map [h, w] as lists, by the published rule."""
    height, width = len(heat), len(heat[0])
    best, at = -math.inf, (0, 0)
    for i in range(height):
        for j in range(width):
            if heat[i][j] > best:
                best, at = heat[i][j], (i, j)
    i, j = at if best > 0 else (0, 0)
    x, y = float(j), float(i)
    if 0 < i < height - 1 and 0 < j < width - 1:
        right, left = heat[i][j + 1], heat[i][j - 1]
        below, above = heat[i + 1][j], heat[i - 1][j]
        x += 0.25 * ((right > left) - (right < left))
        y += 0.25 * ((below > above) - (below < above))
    return (x + 0.5, y + 0.5), best


@pytest.mark.parametrize(("height", "width"), [(5, 7), (8, 3), (2, 2), (1, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decode_is_the_plain_form(dtype, height, width):
    """Whole numbers -1..3, so that maxima and neighbours tie, and maps without any above 0."""
    generator = torch.Generator().manual_seed(height)
    maps = torch.randint(-1, 4, (60, 4, height, width), generator=generator)
    maps[:5] = -maps[:5].abs()
    points, confidence = decode(maps.to(dtype))
    assert points.dtype == confidence.dtype == (dtype if dtype == torch.float64 else torch.float32)
    for n in range(60):
        for number in range(4):
            point, best = plain_decode(maps[n, number].tolist())
            assert tuple(points[n, number].tolist()) == point
            assert confidence[n, number] == best


def test_ties_borders_and_empty_maps():
    maps = torch.zeros(1, 6, 6, 6)
    maps[0, 0, 2, 4] = maps[0, 0, 3, 1] = 1.0  # the first in reading order
    maps[0, 1, 0, 3], maps[0, 1, 0, 4], maps[0, 1, 1, 3] = 1.0, 0.5, 0.5  # a border cell
    maps[0, 2, 3, 5], maps[0, 2, 4, 5] = 1.0, 0.5  # on the right border y does not step either
    maps[0, 3, 3, 3], maps[0, 3, 3, 4], maps[0, 3, 2, 3] = 1.0, 0.5, 0.5  # right and above
    maps[0, 4] = -1.0
    maps[0, 4, 3, 3] = -0.5  # below 0: no landmark
    points, confidence = decode(maps)
    expected = [[4.5, 2.5], [3.5, 0.5], [5.5, 3.5], [3.75, 3.25], [0.5, 0.5], [0.5, 0.5]]
    assert points[0].tolist() == expected
    assert confidence[0].tolist() == [1.0, 1.0, 1.0, 1.0, -0.5, 0.0]


def test_a_map_with_nan_has_no_point():
    maps = torch.rand(1, 1, 5, 5)
    maps[0, 0, 2, 2] = math.nan
    points, confidence = decode(maps)
    assert points.tolist() == [[[0.5, 0.5]]]
    assert confidence.isnan().all()


def test_places_of_narrow_maps_are_not_rounded():
    """bfloat16 has no 100.75."""
    maps = torch.zeros(1, 1, 128, 128, dtype=torch.bfloat16)
    maps[0, 0, 100, 100], maps[0, 0, 100, 101] = 1.0, 0.5
    assert decode(maps)[0].tolist() == [[[100.75, 100.5]]]


def test_no_samples():
    points, confidence = decode(torch.zeros(0, 5, 4, 4))
    assert (points.shape, confidence.shape) == ((0, 5, 2), (0, 5))
    assert gaussian_targets(torch.zeros(0, 5, 3), 4, 1.0).shape == (0, 5, 4, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gaussian_targets(torch.zeros(2, 3), 8, 1.0), r"points: expected \[N, L, 3\]"),
        (lambda: gaussian_targets(torch.zeros(2, 3, 2), 8, 1.0), r"got \[2, 3, 2\]"),
        (
            lambda: gaussian_targets(torch.zeros(2, 3, 3, dtype=torch.int64), 8, 1.0),
            "points: expected a float dtype, got torch.int64",
        ),
        (lambda: gaussian_targets(torch.zeros(2, 3, 3), 0, 1.0), "size: .* >= 1, got 0"),
        (lambda: gaussian_targets(torch.zeros(2, 3, 3), 8, 0.0), "sigma: .* > 0, got 0.0"),
        (
            lambda: gaussian_targets(torch.zeros(2, 3, 3), 8, 1.0, "sub"),
            "kind: expected 'subpixel' or 'published', got 'sub'",
        ),
        (lambda: decode(torch.zeros(2, 4, 4)), r"maps: expected a tensor \[N, L, h, w\]"),
        (lambda: decode(torch.zeros(2, 4, 4, 0)), "maps: expected at least one cell"),
        (lambda: decode(torch.zeros(2, 4, 4, 4, dtype=torch.uint8)), "maps: expected a float"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
