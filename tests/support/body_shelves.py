"""A small shelf of real networks and images, and a routed hub on it: what new images need."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from hubpath_fast.checkpoints import write_model
from hubpath_fast.data import DigitsTask, load_image, write_image_folder
from hubpath_fast.data.transforms import eval_transform
from hubpath_fast.features import Shelf, ShelfModel, write_shelf
from hubpath_fast.features.bodies import features_of, open_body, weights_hash
from hubpath_fast.features.write import write_record
from hubpath_fast.shelf.run import build, write_hub
from hubpath_fast.shelf.settings import ShelfFitSettings

SIZE, OTHER_SIZE = 32, 48
BODIES = {
    "a": ("test_resnet", SIZE),
    "b": ("test_efficientnet", SIZE),
    "c": ("test_byobnet", OTHER_SIZE),
    "d": ("test_resnet", SIZE),
    "e": ("test_vit", 160),  # takes no other size
    "f": ("test_byobnet", SIZE),
}
SPLITS = {"train": "train", "validation": "val", "test": "test"}


def images_of(data: Path) -> dict[str, list[Path]]:
    """The files of each split, in the shelf's order."""
    return {split: sorted((data / name).rglob("*.png")) for split, name in SPLITS.items()}


def make_body_shelf(root: Path, dtype: torch.dtype = torch.float32, limit: int = 40) -> Shelf:
    """root/shelf, of ``BODIES`` with weights in root/weights and up to ``limit`` images a split in
    root/data."""
    data = write_image_folder(DigitsTask(0, 30), root / "data", limit=limit)
    files = images_of(data)
    classes = sorted({path.parent.name for part in files.values() for path in part})
    decoded = [load_image(path) for part in files.values() for path in part]
    targets = [classes.index(path.parent.name) for part in files.values() for path in part]
    features, about = {}, {}
    for i, (label, (arch, size)) in enumerate(BODIES.items()):
        path = root / "weights" / f"{label}.safetensors"
        path.parent.mkdir(exist_ok=True)
        torch.manual_seed(i)
        save_file(timm.create_model(arch).state_dict(), path)
        name = f"file/{path}?arch=timm/{arch}&size={size}"
        about[label] = {"name": name, "weights": weights_hash(path), "size": size, "ms": 1.0}
        cut = torch.stack([eval_transform(size)(image) for image in decoded])
        model = ShelfModel(label=label, position=0, key="", num_features=1, **about[label])
        features[label] = features_of(open_body(model), cut).to(dtype)
    pixels = torch.stack([eval_transform(SIZE)(image) for image in decoded])
    sizes = {split: len(part) for split, part in files.items()}
    shelf = write_shelf(
        root / "shelf", features, torch.tensor(targets), classes, sizes, pixels, about=about
    )
    record = dataclasses.replace(shelf.record, data=str(data), dataset="folder", flip=False)
    write_record(shelf.folder, record)
    return Shelf.open(shelf.folder)


def make_hub(
    shelf: Shelf,
    folder: Path,
    labels: str = "abcd",
    router: str = "image",
    k: int = 2,
    aggregator: str = "linear",
) -> Path:
    """The folder of a hub that was never trained: parts are drawn, so that routes differ."""
    settings = ShelfFitSettings(k=k, router=router, aggregator=aggregator, generator_width=4)
    models = [shelf.find(label) for label in labels]
    torch.manual_seed(5)
    model = build(shelf, models, settings)
    with torch.no_grad():
        for expert in model.experts:
            spread = expert.features.std()
            expert.layer.weight.normal_(std=1 / spread / len(expert.layer.weight.T) ** 0.5)
        for tensor in model.aggregator.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
        numbers = torch.arange(shelf.record.num_images).double()
        generator = model.generator.eval()
        seen = generator.features(generator.seen(numbers))
        # Scores that differ between images, not between experts.
        generator.clean.weight.normal_(std=3 / seen.std(dim=0).norm())
        generator.clean.bias.copy_(-generator.clean.weight @ seen.mean(dim=0))
    write_hub(folder, shelf, models, settings)
    (folder / "best").mkdir()
    write_model(folder / "best", model, {})
    return folder
