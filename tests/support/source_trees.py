"""Small trees in the real layouts of the published data sets."""

from __future__ import annotations

import hashlib
import pickle
import zlib

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets


def image(path, size=(14, 10)):
    """Writes noise that depends on the file's name, its folder's and that one's folder's, so that
    no split holds copies of another. size: width x height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(zlib.crc32("/".join(path.parts[-3:]).encode()))
    Image.fromarray(random.randint(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


def cifar(root, monkeypatch):
    """Pickled dictionaries of bytes, as Python 2 wrote them; 4 + 2 images of 2 classes."""
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, count in (("train", 4), ("test", 2)):
        entry = {
            "data": random.randint(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [i % 2 for i in range(count)],
            "coarse_labels": [0] * count,
        }
        (base / name).write_bytes(pickle.dumps(entry, protocol=2))
    meta = {"fine_label_names": ["apple", "bear"], "coarse_label_names": ["thing"]}
    (base / "meta").write_bytes(pickle.dumps(meta, protocol=2))

    def md5(name):
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5("train")]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5("test")]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5("meta")}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)


def aircraft(root, monkeypatch):
    """Variants with spaces and slashes in their names; 4 + 2 images of 2 classes."""
    data = root / "fgvc-aircraft-2013b" / "data"
    variants = ["707-320", "DC-9-30 / B"]
    lists = {"trainval": [(1, 0), (2, 1), (3, 0), (4, 1)], "test": [(5, 1), (6, 0)]}
    for split, entries in lists.items():
        for number, _ in entries:
            image(data / "images" / f"{number:07}.jpg")
        lines = [f"{number:07} {variants[target]}" for number, target in entries]
        (data / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    (data / "variants.txt").write_text("\n".join(variants) + "\n")


def cars(root, monkeypatch):
    """MATLAB's annotations, classes from 1; 4 + 2 images of 2 classes."""
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    files = {"train": base / "devkit" / "cars_train_annos.mat",
             "test": base / "cars_test_annos_withlabels.mat"}  # fmt: skip
    for split, count in (("train", 4), ("test", 2)):
        fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
        annotations = np.zeros((1, count), dtype=[(name, object) for name in fields])
        for i in range(count):
            name = f"{i + 1:05}.jpg"
            image(base / f"cars_{split}" / name)
            annotations[0, i] = (1, 1, 9, 9, i % 2 + 1, name)
        savemat(files[split], {"annotations": annotations})


def indoors(root, monkeypatch):
    """Lists without a class; 4 + 2 images of 2 classes."""
    lists = {"TrainImages": ["bar/a.jpg", "bar/b b.jpg", "attic/c.jpg", "attic/d.jpg"],
             "TestImages": ["attic/e.jpg", "bar/f.jpg"]}  # fmt: skip
    for name, lines in lists.items():
        for line in lines:
            image(root / "Images" / line)
        (root / f"{name}.txt").write_text("\n".join(lines))


def listed(root, names, inside):
    """Lists of ``path class``; 4 + 2 + 2 images of 2 classes, with paths from root or from the
    split's own folder."""
    for name, count in zip(names, (4, 2, 2), strict=True):
        lines = []
        for i in range(count):
            image(root / name / f"{name}{i}.jpg")
            lines.append(f"{'' if inside else name + '/'}{name}{i}.jpg {i % 2}")
        (root / f"{name}.txt").write_text("\n".join(lines))


def coco(root, monkeypatch):
    listed(root, ("train", "dev", "test"), inside=True)
    (root / "classes.txt").write_text("person\nbicycle\n")


def dmlab(root, monkeypatch):
    listed(root, ("train", "val", "test"), inside=False)


def eurosat(root, monkeypatch):
    """Twenty images of 2 classes in folders."""
    for name in ("Forest", "River"):
        for i in range(1, 11):
            image(root / "eurosat" / "2750" / name / f"{name}_{i}.jpg")


# name: (writes it, classes, images of train, validation and test as published)
TREES = {
    "cifar-100": (cifar, ("apple", "bear"), (4, 0, 2)),
    "coco-70": (coco, ("person", "bicycle"), (4, 2, 2)),
    "aircraft": (aircraft, ("707-320", "DC-9-30 / B"), (4, 0, 2)),
    "cars": (cars, ("AM General Hummer SUV 2000", "Acura RL Sedan 2012"), (4, 0, 2)),
    "indoors": (indoors, ("attic", "bar"), (4, 0, 2)),
    "dmlab": (dmlab, ("0", "1"), (4, 2, 2)),
    "eurosat": (eurosat, ("Forest", "River"), (12, 4, 4)),
}
