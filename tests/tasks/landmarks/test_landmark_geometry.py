"""One matrix moves points and pixels alike: discs, inverses, mirrors, and published boxes."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from hubpath_fast.tasks.landmarks import (
    LAYOUTS,
    LandmarkLayout,
    box_of_points,
    crop_matrix,
    flip_points,
    invert,
    transform_points,
    warp,
)

TWO = LandmarkLayout("two", 2, flip=(1, 0))


def drawn(height, width, points, origin, radius):
    """Soft discs, float64 [1, 1, H, W]: Gaussians whose centroids are the annotated points."""
    y = torch.arange(height, dtype=torch.float64)[:, None] + origin
    x = torch.arange(width, dtype=torch.float64)[None] + origin
    picture = torch.zeros(height, width, dtype=torch.float64)
    for px, py in points:
        picture += torch.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2))
    return picture[None, None]


def centroid(picture):
    """(x, y) of [H, W], where pixel j has its centre at j + 0.5."""
    steps_y, steps_x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in picture.shape)
    picture = picture.double()
    total = picture.sum()
    return torch.stack([(picture.sum(0) @ steps_x) / total, (picture.sum(1) @ steps_y) / total])


def plain_matrix(center, scale, rotation, size, margin, flip):
    """The formula of the published code for one sample, as translations and a turn, 3 x 3."""

    def move(x, y):
        return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1.0]], dtype=torch.float64)

    s, r = size / (200 * scale * margin), math.radians(rotation)
    cos, sin = math.cos(r), math.sin(r)
    turn = torch.tensor(
        [[s * cos, s * sin, 0], [-s * sin, s * cos, 0], [0, 0, 1]], dtype=torch.float64
    )
    whole = move(size / 2, size / 2) @ turn @ move(-center[0], -center[1])
    if flip:
        mirror = torch.diag(torch.tensor([-1.0, 1, 1], dtype=torch.float64))
        whole = move(size, 0) @ mirror @ whole
    return whole[:2]


def test_matrices_are_the_plain_formula():
    center = [(100.5, 80.0), (12.25, 300.0), (512.0, 511.0), (64.0, 64.0)]
    scale, rotation = [0.6, 1.35, 4.1, 0.05], [0.0, 30.0, -17.5, 180.0]
    flip = torch.tensor([False, True, False, True])
    made = crop_matrix(center, scale, rotation, 256, margin=1.25, flip=flip)
    plain = torch.stack(
        [
            plain_matrix(c, s, r, 256, 1.25, bool(f))
            for c, s, r, f in zip(center, scale, rotation, flip, strict=True)
        ]
    )
    assert made.dtype == torch.float64
    assert (made - plain).abs().max() < 1e-11
    unflipped = crop_matrix(center, scale, rotation, 256)
    assert torch.equal(made[::2], unflipped[::2])
    # The centre of a box comes to the crop's, and a turn > 0 is counter-clockwise on screen: what
    # lay right of the centre then lies above it.
    moved = transform_points(unflipped[1:2], torch.tensor([[center[1], (112.25, 300.0)]]))
    s = 256 / (200 * 1.35 * 1.25)
    assert torch.allclose(
        moved[0].double(),
        torch.tensor(
            [
                [128.0, 128.0],
                [128 + 100 * s * math.cos(math.pi / 6), 128 - 100 * s * math.sin(math.pi / 6)],
            ],
            dtype=torch.float64,
        ),
        atol=1e-9,
    )


def test_the_box_of_a_map_is_a_quarter_of_the_crops():
    asked = ([(100.0, 90.0)], [0.8], [20.0])
    pixels, cells = crop_matrix(*asked, 256), crop_matrix(*asked, 64)
    assert (pixels / 4 - cells).abs().max() < 1e-12


@pytest.mark.parametrize("flip", [None, torch.tensor([True, False, True])])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 0.01)])
def test_crop_and_back(dtype, bound, flip):
    generator = torch.Generator().manual_seed(0)
    points = 1024 * torch.rand(3, 50, 2, dtype=torch.float64, generator=generator)
    matrix = crop_matrix(
        [(500.0, 400.0), (20.0, 30.0), (900.0, 100.0)], [3.0, 0.4, 1.1], [25.0, -30, 0], 256,
        flip=flip,
    ).to(dtype)  # fmt: skip
    there = transform_points(matrix, points.to(dtype))
    back = transform_points(invert(matrix), there)
    assert back.dtype == dtype
    assert invert(matrix).dtype == dtype
    assert (back.double() - points).abs().max() < bound


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("origin", [0, 1])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("shrink", [0.4, 1.0, 1.5, 2.0, 3.0, 5.0])
def test_a_disc_at_a_landmark_is_found_where_the_point_goes(shrink, size, origin, flip):
    """Half a pixel off, an origin forgotten, or a window cut at a fraction would be 0.5 px."""
    side = size * shrink  # of the box in source pixels
    width, height = int(1.6 * side) + 30, int(1.5 * side) + 21
    center = (0.5 * width + 3.3, 0.5 * height - 2.6)
    point = (center[0] + 0.21 * side, center[1] - 0.17 * side)
    radius = 2.0 * max(shrink, 0.6)  # in source pixels: 2 or 3 in the crop
    picture = drawn(height, width, [point], origin, radius)
    matrix = crop_matrix([center], [side / 200 / 1.25], [23.0], size, flip=torch.tensor([flip]))
    expected = transform_points(matrix, torch.tensor([[point]], dtype=torch.float64))[0, 0]
    for images in (picture, picture.float(), (200 * picture).round().to(torch.uint8)):
        crop = warp(images, matrix, size, origin=origin)
        assert crop.dtype == images.dtype
        assert crop.shape == (1, 1, size, size)
        assert (centroid(crop[0, 0]) - expected).abs().max() < 0.1
    # The same for a matrix as float32, and no cruder than 0.02 px where nothing is rounded.
    crop = warp(picture, matrix.float(), size, origin=origin)
    assert (centroid(crop[0, 0]) - expected).abs().max() < 0.02


def supersampled(image, matrix, size, origin, factor):
    """A crop by its definition: bilinear reads of means over ``factor`` pixels, in float64, at
    every place apart, the picture being zeros outside."""
    channels, height, width = image.shape
    back = invert(matrix)[0]

    def mean(c, block_y, block_x):
        total = 0.0
        for y in range(block_y * factor, block_y * factor + factor):
            for x in range(block_x * factor, block_x * factor + factor):
                if 0 <= y < height and 0 <= x < width:
                    total += image[c, y, x].item()
        return total / factor**2

    crop = torch.zeros(channels, size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            at = back[:, 0] * (j + 0.5) + back[:, 1] * (i + 0.5) + back[:, 2] - origin
            x, y = ((at + 0.5) / factor - 0.5).tolist()
            x0, y0 = math.floor(x), math.floor(y)
            for c in range(channels):
                crop[c, i, j] = sum(
                    (1 - abs(x - xx)) * (1 - abs(y - yy)) * mean(c, yy, xx)
                    for xx in (x0, x0 + 1)
                    for yy in (y0, y0 + 1)
                )
    return crop


@pytest.mark.parametrize(("box", "factor"), [(9.0, 1), (15.9, 1), (17.5, 2), (27.0, 3)])
def test_warp_is_its_definition(box, factor):
    """At the picture's corner, so that blocks start at its first pixel and reads fall outside."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 2, 22, 25, dtype=torch.float64, generator=generator)
    matrix = crop_matrix([(7.0, 6.5)], [box / 200], [12.0], 8, margin=1.0)
    expected = supersampled(image[0], matrix, 8, 1, factor)
    assert (warp(image, matrix, 8, origin=1)[0] - expected).abs().max() < 1e-12
    assert (expected == 0).any() == (box > 15)  # some reads lie outside


def test_identity_and_whole_shifts_keep_the_bits():
    image = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    same = crop_matrix([(9.5, 9.5)], [20 / 200], [0.0], 20, margin=1.0)
    assert torch.equal(warp(image, same, 20), image)
    one = crop_matrix([(10.5, 10.5)], [20 / 200], [0.0], 20, margin=1.0)
    assert torch.equal(warp(image, one, 20, origin=1), image)
    moved = crop_matrix([(12.5, 9.5)], [20 / 200], [0.0], 20, margin=1.0)
    assert torch.equal(warp(image, moved, 20)[..., :17], image[..., 3:])
    assert not warp(image, moved, 20)[..., 17:].any()  # zeros outside


def test_a_turned_picture_is_torchvisions():
    """A second opinion on direction, centre and interpolation; its own points would be off."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    matrix = crop_matrix([(31.5, 31.5)], [64 / 200], [25.0], 64, margin=1.0)
    turned = rotate(image, 25.0, InterpolationMode.BILINEAR)
    assert (warp(image, matrix, 64) - turned).abs()[..., 2:-2, 2:-2].max() < 1e-4


def test_a_fine_pattern_becomes_grey_where_a_crop_shrinks():
    """A checkerboard read at single points would come out black, white or as waves."""
    board = torch.zeros(1, 1, 600, 600)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = 1.0
    matrix = crop_matrix([(300.0, 300.0)], [400 / 200], [0.0], 100, margin=1.0)  # 4 to 1
    crop = warp(board, matrix, 100)
    assert (crop - 0.5).abs().max() < 1e-6


def test_bytes_are_summed_without_loss():
    """White stays white however many pixels a mean is over."""
    for side in (300, 1500):  # means over 37 and over 187 pixels a side
        white = torch.full((1, 1, side, side), 255, dtype=torch.uint8)
        matrix = crop_matrix([(side / 2 - 0.5, side / 2 - 0.5)], [side / 200], [0.0], 8, margin=1.0)
        crop = warp(white, matrix, 8)[0, 0]
        assert (crop[1:-1, 1:-1] == 255).all()


def test_each_sample_has_its_own_shrinking():
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(3, 1, 80, 90, generator=generator)
    matrix = crop_matrix(
        [(40.0, 40.0), (50.0, 30.0), (1000.0, 1000.0)], [0.06, 0.4, 0.3], [0.0, 40.0, 0.0], 16
    )
    crops = warp(images, matrix, 16)
    alone = torch.cat([warp(images[i : i + 1], matrix[i : i + 1], 16) for i in range(3)])
    assert torch.equal(crops, alone)
    assert not crops[2].any()  # its box lies outside


def test_flip_commutes_with_the_crop():
    """The mirrored source, its points flipped, against the crop that mirrors."""
    width, height, origin, size = 150, 120, 1, 64
    points = torch.tensor([[[50.0, 40.0], [98.5, 71.25]]], dtype=torch.float64)
    picture = drawn(height, width, points[0].tolist(), origin, 3.0)
    center, scale = (70.0, 60.5), 0.45
    flipped = crop_matrix([center], [scale], [15.0], size, flip=torch.tensor([True]))
    # A turn in the mirror goes the other way, and the centre is one more point.
    mirrored_center = (width - 1 - center[0] + 2 * origin, center[1])
    mirrored = crop_matrix([mirrored_center], [scale], [-15.0], size)
    mirrored_points = flip_points(points, width, TWO, origin=origin)
    there = transform_points(flipped, points)[:, [1, 0]]
    assert (transform_points(mirrored, mirrored_points) - there).abs().max() < 1e-9
    crop = warp(picture, flipped, size, origin=origin)
    again = warp(picture.flip(3), mirrored, size, origin=origin)
    assert (crop - again).abs().max() < 1e-6
    # And in the crop's own coordinates, where the first pixel's centre is 0.5.
    plain = crop_matrix([center], [scale], [15.0], size)
    in_crop = flip_points(transform_points(plain, points), size, TWO, origin=0.5)
    assert (in_crop - there).abs().max() < 1e-9


@pytest.mark.parametrize("origin", [0, 1])
def test_a_mirrored_picture_has_its_disc_at_the_flipped_point(origin):
    """Width - x on numbers that start at 1 would be one pixel off."""
    points = [(30.25, 20.0), (70.0, 41.5)]
    for number, point in enumerate(points):
        picture = drawn(60, 100, [point], origin, 2.0).flip(3)
        there = flip_points(torch.tensor(points, dtype=torch.float64), 100, TWO, origin=origin)
        found = centroid(picture[0, 0]) - 0.5 + origin
        assert (found - there[1 - number]).abs().max() < 1e-9


@pytest.mark.parametrize("name", LAYOUTS)
def test_flipping_twice_is_the_identity(name):
    points = torch.rand(2, LAYOUTS[name].num_points, 2, dtype=torch.float64) * 200
    twice = flip_points(flip_points(points, 199, name, origin=1), 199, name, origin=1)
    assert (twice - points).abs().max() < 1e-12


def test_boxes_by_the_published_rule():
    # floor and ceil before the middle is taken: 10..41 and 5..26.
    assert box_of_points([[10.2, 5.0], [40.1, 25.9], [20.0, 20.0]]) == (31 / 200, 25.5, 15.5)
    assert box_of_points([[-3.5, 0.0], [2.0, 50.0]]) == (50 / 200, -1.0, 25.0)


def test_gradients_reach_the_pictures():
    image = torch.rand(1, 1, 30, 30, dtype=torch.float64, requires_grad=True)
    matrix = crop_matrix([(15.0, 14.0)], [0.1], [10.0], 8)
    warp(image, matrix, 8).sum().backward()
    assert image.grad.sum().item() == pytest.approx(64)  # each read is a mean, weights sum to one


def test_an_empty_batch():
    matrix = crop_matrix(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0), 16)
    assert matrix.shape == (0, 2, 3)
    assert warp(torch.zeros(0, 3, 9, 9, dtype=torch.uint8), matrix, 16).shape == (0, 3, 16, 16)
    assert transform_points(matrix, torch.zeros(0, 5, 2)).shape == (0, 5, 2)


def ask(**change):
    given = {"center": [(5.0, 5.0)], "scale": [1.0], "rotation": [0.0], "size": 8, **change}
    return crop_matrix(**given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ask(center=[5.0, 5.0]), r"center: expected \[N, 2\], got \[2\]"),
        (lambda: ask(scale=[1.0, 2.0]), r"scale: expected \[1\], one a centre, got \[2\]"),
        (lambda: ask(rotation=0.0), r"rotation: expected \[1\]"),
        (lambda: ask(scale=[0.0]), "scale: expected numbers > 0, got 0 at 0"),
        (lambda: ask(scale=[float("nan")]), "scale: expected finite numbers, got nan"),
        (lambda: ask(center=[(math.inf, 0)]), "center: expected finite numbers, got inf"),
        (lambda: ask(size=0), "size: expected a whole number of pixels >= 1, got 0"),
        (lambda: ask(size=8.5), "size: expected a whole number"),
        (lambda: ask(margin=-1), "margin: expected a number > 0, got -1"),
        (lambda: ask(flip=[1]), r"flip: expected bool \[1\]"),
        (lambda: invert(torch.zeros(1, 2, 3)), "can be inverted, got .* at 0"),
        (lambda: invert(torch.eye(3)), r"matrix: expected a tensor \[N, 2, 3\], got \[3, 3\]"),
        (lambda: invert(torch.full((1, 2, 3), math.nan)), "matrix: expected finite numbers"),
        (lambda: transform_points(ask(), torch.zeros(5, 2)), r"points: expected \[1, L, 2\]"),
        (lambda: flip_points(torch.zeros(5, 2), 9, "cofw"), r"29, 2\] of cofw, got \[5, 2\]"),
        (
            lambda: flip_points(torch.zeros(5, 2), 9, LandmarkLayout("own", 5)),
            "own has no pairs",
        ),
        (lambda: box_of_points([[1, 2], [1, 2]]), r"all 2 points lie at \(1.0, 2.0\)"),
        (lambda: box_of_points([1, 2]), r"points: expected \[L, 2\], got \[2\]"),
        (lambda: warp(torch.zeros(3, 9, 9), ask(), 8), r"images: expected a tensor \[N, C, H, W\]"),
        (
            lambda: warp(torch.zeros(1, 3, 9, 9, dtype=torch.int64), ask(), 8),
            "images: expected uint8 or a float dtype, got torch.int64",
        ),
        (lambda: warp(torch.zeros(2, 3, 9, 9), ask(), 8), r"matrix: expected \[2, 2, 3\]"),
        (lambda: warp(torch.zeros(1, 3, 9, 9), ask(), -8), "size: expected a whole number"),
    ],
)  # fmt: skip
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
