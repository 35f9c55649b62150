"""What a router on the image looks at: the same of a new image as of one on the shelf."""

from __future__ import annotations

import torch
from support.command import hubpath

from hubpath_fast.data import DigitsTask, load_image, write_image_folder
from hubpath_fast.features import Shelf
from hubpath_fast.features.pixels import router_transform

CROP, SIZE = 80, 64


def test_new_images_are_cut_and_resized_as_those_of_the_shelf(tmp_path):
    data = write_image_folder(DigitsTask(0, 30), tmp_path / "data", limit=40)
    hubpath(
        "shelf", "extract", "--data", data, "--hub", "timm/test_resnet", "--no-pretrained",
        "--image-size", CROP, "--views", 2, "--out", tmp_path / "shelf",
    )  # fmt: skip
    shelf = Shelf.open(tmp_path / "shelf")
    assert (shelf.record.router_crop, shelf.record.router_size) == (CROP, SIZE)
    rows = [row for split in ("train", "validation", "test") for row in shelf.images().rows[split]]
    transform = router_transform(CROP, SIZE)
    found = torch.stack([transform(load_image(data / row.path)) for row in rows])
    assert torch.equal(found, shelf.pixels()[0])
    assert not torch.equal(found, shelf.pixels()[1])
