from __future__ import annotations

import pytest
from support.source_trees import image


@pytest.fixture
def write_images():
    """write_images(root, {"train/cat/1.png": (20, 16)}): noise, width x height, for each file."""

    def write(root, sizes):
        for name, size in sizes.items():
            image(root / name, size)
        return root

    return write


@pytest.fixture
def animals(tmp_path, write_images):
    """train/ and test/ with 10 cats, 6 dogs and 4 emus in train, 2 of each in test."""
    numbers = {"train": {"cat": 10, "dog": 6, "emu": 4}, "test": {"cat": 2, "dog": 2, "emu": 2}}
    sizes = {
        f"{split}/{name}/{i}.png": (20 + i, 16)
        for split, counts in numbers.items()
        for name, count in counts.items()
        for i in range(count)
    }
    return write_images(tmp_path / "animals", sizes)
