"""Crops and targets of faces: they agree with each other, and with any way to read the pixels."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support.faces import draw_discs, write_cofw, write_photo

from hubpath_fast.data import TrainStream, load_image
from hubpath_fast.data.order import Draw
from hubpath_fast.tasks.landmarks import (
    Face,
    FaceAugment,
    FaceDataset,
    FaceSplit,
    LandmarkLayout,
    read_landmarks,
)
from hubpath_fast.tasks.landmarks.photos import look, read_face_image
from hubpath_fast.tasks.landmarks.windows import cut, find_place

TURNS = FaceAugment(flip=True, rotation=30, rotation_prob=1.0, scaling=0.25)


def layout(origin=0, flip=(1, 0, 2)):
    return LandmarkLayout("own", 3, flip=flip, origin=origin, unit="diagonal")


def disc_face(folder, origin, side, size=(1000, 900)):
    """A face of three discs, far apart, in a photograph without loss."""
    low = torch.tensor([310.3, 255.6], dtype=torch.float64)
    points = low + side * torch.tensor([[0.1, 0.2], [0.95, 0.1], [0.4, 0.9]], dtype=torch.float64)
    path = folder / f"{origin}-{side}.png"
    Image.fromarray(draw_discs(points.tolist(), size, origin, sigma=side / 25)).save(path)
    center = (low + side / 2).tolist()
    return Face("x", points, tuple(center), side / 200, path, path, 2, origin=origin)


def centroid(crop, near, reach):
    """Of the brightness about a place, in continuous coordinates of the crop."""
    size = crop.shape[-1]
    at = torch.arange(size) + 0.5
    inside = ((at[None, :] - near[0]) ** 2 + (at[:, None] - near[1]) ** 2) < reach**2
    weight = crop[0].double() * inside
    x, y = (weight * at[None, :]).sum(), (weight * at[:, None]).sum()
    return torch.stack([x, y]) / weight.sum()


@pytest.mark.parametrize("origin", [0, 1])
@pytest.mark.parametrize(
    ("side", "size"),
    [(200, 256), (300, 128), (420, 128), (560, 64)],
    ids=["grown", "shrunk", "reduced by 4", "reduced by 10"],
)
def test_discs_are_where_targets_say(tmp_path, origin, side, size):
    """After flip, turn, scale and crop, within 0.1 pixel of the crop."""
    face = disc_face(tmp_path, origin, side)
    dataset = FaceDataset(FaceSplit((face,), layout(origin)), size, augment=TURNS)
    seen, reach = 0, 0.12 * size  # five sigmas of a disc as it becomes at most
    for seed in range(12):
        crop, target = dataset[Draw(0, seed)]
        assert (crop.dtype, crop.shape) == (torch.uint8, (3, size, size))
        assert (target.dtype, target.shape) == (torch.float32, (3, 4))
        for x, y, weight, _ in (4 * target).tolist():
            if reach < x < size - reach and reach < y < size - reach:
                found = centroid(crop, (x, y), reach)
                assert (found - torch.tensor([x, y])).abs().max() < 0.1
                assert weight == 4
                seen += 1
    assert seen >= 12


def test_a_mirrored_face_has_its_pairs_swapped(tmp_path):
    """The left disc of a mirrored photograph is the landmark that was right."""
    face = disc_face(tmp_path, 0, 200)
    still = FaceAugment(flip=True, rotation=0, rotation_prob=0, scaling=0)
    dataset = FaceDataset(FaceSplit((face,), layout()), 64, augment=still)
    plain, before = FaceDataset(dataset.split, 64)[0]
    found = [dataset[Draw(0, seed)] for seed in range(20)]
    flips = [(crop, target) for crop, target in found if not torch.equal(target, before)]
    assert 4 < len(flips) < 16
    for crop, target in flips:
        assert (crop.flip(2).int() - plain.int()).abs().max() <= 1
        assert torch.allclose(target[:, 0], 16 - before[[1, 0, 2], 0], atol=1e-5)
        assert torch.allclose(target[:, 1:], before[[1, 0, 2], 1:])
    unknown = FaceDataset(FaceSplit((face,), layout(flip=None)), 64, augment=still)
    assert all(torch.equal(unknown[Draw(0, seed)][1], before) for seed in range(8))


def test_targets_in_numbers(tmp_path):
    """A box of 200 pixels about (100, 80): 250 become 64, so that a cell has 15.625."""
    path = write_photo(tmp_path / "a.png")
    points = torch.tensor([[100.0, 80], [60, 50], [300, 50]], dtype=torch.float64)
    face = Face("a", points, (100.0, 80.0), 1.0, path, path, 2)
    own = LandmarkLayout("own", 3, outer_eye_corners=(0, 1))
    target = FaceDataset(FaceSplit((face,), own), 64)[0][1]
    cell = 250 / 16
    wanted = [[8, 8, 1, 50 / cell], [8 - 40 / cell, 8 - 30 / cell, 1, 50 / cell],
              [8 + 200 / cell, 8 - 30 / cell, 0, 50 / cell]]  # fmt: skip
    assert torch.allclose(target, torch.tensor(wanted), atol=1e-5)
    diagonal = FaceDataset(FaceSplit((face,), own), 64, "diagonal")[0][1]
    assert diagonal[0, 3].item() == pytest.approx((240**2 + 30**2) ** 0.5 / cell)
    pair = FaceDataset(FaceSplit((face,), own), 64, "1-2")[0][1]
    assert pair[0, 3].item() == pytest.approx(240 / cell)


def test_targets_and_matrices_without_photographs(tmp_path):
    faces = tuple(disc_face(tmp_path, 0, side) for side in (200, 300))
    dataset = FaceDataset(FaceSplit(faces, layout()), 64)
    assert torch.equal(dataset.targets(), torch.stack([dataset[i][1] for i in range(2)]))
    corners = dataset.matrices() @ torch.tensor([410.3, 355.6, 1.0], dtype=torch.float64)
    assert torch.allclose(corners[0], torch.tensor([32.0, 32.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="augment"):
        FaceDataset(dataset.split, 64, augment=TURNS).targets()
    empty = FaceDataset(dataset.split.subset([]), 64)
    assert (len(empty), empty.targets().shape) == (0, (0, 3, 4))


def test_draws_are_those_of_the_seed(tmp_path):
    """By the seed alone, in a batch as alone, and torch's own state stays."""
    dataset = FaceDataset(FaceSplit((disc_face(tmp_path, 0, 200),), layout()), 64, augment=TURNS)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    batch = dataset.__getitems__([Draw(0, 5), Draw(0, 6)])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    free = dataset[0]
    for one, other in ((batch[0], dataset[Draw(0, 5)]), (batch[0], free)):
        assert all(map(torch.equal, one, other))
    assert not torch.equal(batch[1][1], batch[0][1])


def test_spread_of_the_draws(tmp_path):
    """Turned with its probability and to both sides, sizes between both ends, half mirrored."""
    split = FaceSplit((disc_face(tmp_path, 0, 200),), layout())
    dataset = FaceDataset(split, 64, augment=FaceAugment())
    keys = [Draw(0, seed) for seed in range(2000)]
    matrices, mirrored = dataset._matrices([0] * 2000, [dataset._draws(key) for key in keys])
    a, b = matrices[:, 1, 1], matrices[:, 1, 0]
    angle = torch.rad2deg(torch.atan2(-b, a))
    turned = angle.abs() > 1e-9
    assert turned.double().mean().item() == pytest.approx(0.6, abs=0.04)
    assert angle.abs().max().item() == pytest.approx(30, abs=0.5)
    assert angle.mean().item() == pytest.approx(0, abs=1.5)
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=0.04)
    larger = 64 / 250 / torch.hypot(a, b)
    assert larger.min().item() == pytest.approx(0.75, abs=0.01)
    assert larger.max().item() == pytest.approx(1.25, abs=0.01)


def test_jitter_moves_the_box_as_a_detector_would(tmp_path):
    split = FaceSplit((disc_face(tmp_path, 0, 200),) * 300, layout())
    plain, moved = FaceDataset(split, 64), FaceDataset(split, 64, jitter=0.1)
    assert torch.equal(moved.matrices(), FaceDataset(split, 64, jitter=0.1).matrices())
    scale = moved.matrices()[:, 0, 0] / plain.matrices()[:, 0, 0]
    assert 1 / 1.1 <= scale.min() < 0.92
    assert 1.09 < scale.max() <= 1 / 0.9
    centre = (32 - moved.matrices()[:, :, 2]) / moved.matrices()[:, 0, 0][:, None]
    shift = (centre - torch.tensor(split.faces[0].center)) / 200
    assert shift.abs().max().item() == pytest.approx(0.1, abs=0.003)
    crop, target = moved[7]
    for x, y, *_ in (4 * target).tolist():
        assert (centroid(crop, (x, y), 8) - torch.tensor([x, y])).abs().max() < 0.1


def test_a_window_is_blocks_of_the_photograph(tmp_path):
    """Means rounded to the nearest, zeros outside of the photograph."""
    image = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3, 300, 400)).astype("u1"))
    face = Face(
        "x", torch.zeros(3, 2).double(), (390.0, 150.0), 200 * 3 * 64 / 250 / 200, "", "", 2
    )
    place = find_place(face, 64, 1.0, 400, 300)
    assert (place.factor, place.left % 3, place.right, place.top) == (3, 0, 402, 36)
    window = cut(image, place)
    padded = torch.zeros(3, 300, 402)
    padded[:, :, :400] = image
    blocks = padded[:, place.top : place.bottom, place.left : place.right]
    means = torch.nn.functional.avg_pool2d(blocks.double(), 3)
    assert torch.equal(window.pixels, (means + 0.5).floor().to(torch.uint8))


def test_photographs_are_read_in_one_way(tmp_path):
    """JPEGs by the faster decoder give the bytes of ``load_image``; grey has three channels."""
    plain = write_photo(tmp_path / "a.jpg", quality=90)
    grey = tmp_path / "grey.jpg"
    Image.open(plain).convert("L").save(grey)
    cmyk = tmp_path / "cmyk.jpg"
    Image.open(plain).convert("CMYK").save(cmyk)
    for path in (plain, grey, cmyk, write_photo(tmp_path / "a.png")):
        for upright in (True, False):
            pixels = read_face_image(path, upright).permute(1, 2, 0)
            assert np.array_equal(pixels, np.asarray(load_image(path)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_orientation(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write_photo(tmp_path / f"a.{ending}", exif=exif)
    bare = write_photo(tmp_path / f"b.{ending}")
    assert np.array_equal(read_face_image(path, False), read_face_image(bare, True))
    turned = read_face_image(path, True)
    assert np.array_equal(turned.permute(1, 2, 0), np.asarray(load_image(path)))
    seen = look(path)
    assert (seen.size, seen.orientation, seen.fault) == ((200, 160), orientation, None)
    assert seen.shown_size(True) == (turned.shape[2], turned.shape[1])


def test_batches_with_workers_are_those_without(tmp_path):
    faces = tuple(disc_face(tmp_path, 0, side) for side in (150, 180, 220, 260, 300))
    dataset = FaceDataset(FaceSplit(faces, layout()), 64, augment=TURNS)
    streams = [TrainStream(dataset, 4, 1, workers).batches(2) for workers in (0, 2)]
    for _, own, others in zip(range(3), *streams, strict=False):
        assert all(map(torch.equal, own, others))
    for stream in streams:
        stream.close()


def test_faces_travel_to_other_processes(tmp_path):
    write_cofw(tmp_path / "c.mat")
    [face, *_], _ = read_landmarks(tmp_path / "c.mat", "cofw")
    again = pickle.loads(pickle.dumps(face))
    assert torch.equal(again.points, face.points)
    assert torch.equal(again.occluded, face.occluded)
    assert torch.equal(again.pixels(), face.pixels())


def test_sizes_that_have_no_maps(tmp_path):
    split = FaceSplit((disc_face(tmp_path, 0, 200),), layout())
    for size in (0, 30):
        with pytest.raises(ValueError, match="size: expected a multiple of 4"):
            FaceDataset(split, size)
    with pytest.raises(ValueError, match="jitter"):
        FaceDataset(split, 64, jitter=1.0)


def test_a_box_without_bounds_asks_for_no_memory(tmp_path):
    """Such a list is a mistake, which the boxes' check shows; it must not end the process."""
    points = torch.tensor([[10.0, 20.0], [50.0, 20.0], [30.0, 60.0]], dtype=torch.float64)
    face = Face("a", points, (30.0, 40.0), 1e7, tmp_path / "a.jpg", tmp_path / "l.csv", 2)
    place = find_place(face, 256, 2.0, 160, 120)
    assert place.right - place.left <= 2 * 160
    assert place.bottom - place.top <= 2 * 120
