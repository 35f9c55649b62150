"""Small sets of faces in the formats that they are published in, with discs at landmarks."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hubpath_fast.tasks.landmarks import LAYOUTS, box_of_points

ATTRIBUTES = ("largepose", "expression", "illumination", "makeup", "occlusion", "blur")


def draw_points(count, seed=0, box=(40, 30, 140, 120)):
    """float64 [count, 2], rounded to thousandths, within a box."""
    random = np.random.RandomState(seed)
    low, high = np.array(box[:2]), np.array(box[2:])
    return np.round(low + random.rand(count, 2) * (high - low), 3)


def draw_discs(points, size=(200, 160), origin=0, sigma=2.0):
    """uint8 [h, w]: grey, black but for a soft disc at each point, exact to a part of a pixel."""
    x = np.arange(size[0])[None, :] + origin
    y = np.arange(size[1])[:, None] + origin
    image = np.zeros((size[1], size[0]))
    for px, py in points:
        image = np.maximum(image, np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma**2)))
    return np.rint(255 * image).astype(np.uint8)


def write_photo(path, points=(), size=(200, 160), origin=0, seed=0, **options):
    """A photograph: discs on coarse noise that differs by the seed. Returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 120, (5, 5, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    if len(points):
        pixels = np.maximum(pixels, draw_discs(points, size, origin)[..., None])
    Image.fromarray(pixels).save(path, **options)
    return path


def hrnet_row(name, points):
    """A row of HRNet's CSV, its box by the published rule."""
    return [name, *box_of_points(torch.from_numpy(points)), *points.reshape(-1).tolist()]


def write_csv(path, header, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def hrnet_header(count):
    points = [f"original_{i}_{axis}" for i in range(count) for axis in "xy"]
    return ["image_name", "scale", "center_w", "center_h", *points]


def write_hrnet(root, name, lists, size=(200, 160)):
    """HRNet's lists of a set below ``root``, with photographs in images/.

    lists: file's ending, such as "train" or "test_blur", -> names of faces "PHOTO:SEED"; the same
    name is the same face. Returns the points by name.
    """
    layout, root = LAYOUTS[name], Path(root)
    faces = {
        face: draw_points(layout.num_points, int(face.partition(":")[2] or 0))
        for names in lists.values()
        for face in names
    }
    photos: dict[str, list] = {}
    for face, points in faces.items():
        photos.setdefault(face.partition(":")[0], []).append(points)
    for seed, (photo, points) in enumerate(photos.items()):
        points = np.concatenate(points)
        write_photo(root / "images" / photo, points, size, layout.origin, seed)
    header = hrnet_header(layout.num_points)
    for ending, names in lists.items():
        rows = [hrnet_row(face.partition(":")[0], faces[face]) for face in names]
        write_csv(root / f"face_landmarks_{name}_{ending}.csv", header, rows)
    return faces


def wflw_line(name, points, groups=()):
    """A line of WFLW's own list. Its box, of a detector, is wrong on purpose."""
    flags = ["1" if group in groups else "0" for group in ATTRIBUTES]
    numbers = [f"{value:.6f}" for value in np.asarray(points).reshape(-1)]
    return " ".join([*numbers, "1", "2", "33", "44", *flags, name])


def write_wflw(root, lists, size=(200, 160)):
    """WFLW as it is published. lists: "train" or "test" -> [(photo, seed, groups)]."""
    root, faces = Path(root), {}
    place = root / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    place.mkdir(parents=True)
    for split, rows in lists.items():
        lines = []
        for photo, seed, groups in rows:
            points = faces[photo, seed] = draw_points(98, seed)
            write_photo(root / "WFLW_images" / photo, points, size, 0, seed)
            lines.append(wflw_line(photo, points, groups))
        text = "\n".join(lines) + "\n"
        (place / f"list_98pt_rect_attr_{split}.txt").write_text(text, encoding="utf-8")
    return faces


def write_cofw(path, count=3, part="train", grey=(), size=(200, 160), userblock=512):
    """COFW's .mat of MATLAB 7.3: cells of references to images stored transposed, 1-based numbers.
    grey: which images are. Returns (points [n, 29, 2], occluded [n, 29], images [h, w(, 3)])."""
    import h5py

    end = {"train": "Tr", "test": "T"}[part]
    random = np.random.RandomState(0)
    points = np.stack([draw_points(29, seed) for seed in range(count)])
    occluded = random.rand(count, 29) < 0.3
    images = []
    for i in range(count):
        discs = draw_discs(points[i], size, origin=1)
        coloured = np.stack([discs, discs // 2, discs // 3], axis=2)
        images.append(discs if i in grey else coloured)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=userblock) as file:
        cell = file.create_dataset(f"Is{end}", (1, count), dtype=h5py.ref_dtype)
        for i, image in enumerate(images):
            stored = file.create_dataset(f"#refs#/{i}", data=image.T)
            cell[0, i] = stored.ref
        phis = np.concatenate([points[..., 0], points[..., 1], occluded], axis=1)
        file[f"phis{end}"] = phis.T.astype(np.float64)
        file[f"bboxes{end}"] = np.zeros((4, count))
    if userblock:
        with open(path, "r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")
    return points, occluded, images


def write_old_cofw(path, points, occluded, images, part="train"):
    """The same as an older .mat, whose arrays are not transposed."""
    from scipy.io import savemat

    end = {"train": "Tr", "test": "T"}[part]
    cell = np.empty((len(images), 1), dtype=object)
    cell[:, 0] = images
    phis = np.concatenate([points[..., 0], points[..., 1], occluded], axis=1)
    savemat(path, {f"Is{end}": cell, f"phis{end}": phis.astype(np.float64)})
    return path


def own_header(names=("left_eye", "right_eye", "mouth")):
    return ["image", *(f"{name}_{axis}" for name in names for axis in "xy")]


def write_own(root, rows, header=None, name="faces.csv", size=(200, 160)):
    """A user's list: rows [(photo, points [L, 2])], the photographs beside it."""
    root = Path(root)
    photos: dict[str, list] = {}
    for photo, points in rows:
        photos.setdefault(photo, []).append(np.asarray(points))
    for seed, (photo, points) in enumerate(photos.items()):
        write_photo(root / photo, np.concatenate(points), size, 0, seed)
    lines = [[photo, *np.asarray(points).reshape(-1).tolist()] for photo, points in rows]
    return write_csv(root / name, header or own_header(), lines)
