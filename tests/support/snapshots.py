"""A folder of small images, and files of weights of small networks, to make shelves of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ARCHITECTURE = "timm/test_resnet"
SIDE = 32


def write_photos(root: Path, count: int = 4, seed: int = 0) -> Path:
    """PNG files train/CLASS/NAME and test/CLASS/NAME of two classes, ``count`` in train and one in
    test of each."""
    draw = np.random.default_rng(seed)
    for split, number in (("train", count), ("test", 1)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(number):
                pixels = draw.integers(0, 256, (50, 41, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def write_weights(path: Path, seed: int = 0, classes: int = 5, scale: float = 1.0) -> Path:
    """Of an ``ARCHITECTURE`` with a head for some classes, as ``file/PATH?arch=...`` takes it.
    scale: of the last block's weights before the features."""
    torch.manual_seed(seed)
    network = timm.create_model(ARCHITECTURE.removeprefix("timm/"), num_classes=classes)
    state = network.state_dict()
    for name in list(state):
        if name.startswith("layer4") and name.endswith("weight"):
            state[name] = state[name] * scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def spec_of(path: Path | str, size: int | None = SIDE) -> str:
    return f"file/{path}?arch={ARCHITECTURE}" + (f"&size={size}" if size else "")


def contents(shelf: Path) -> dict:
    """Of a shelf all that two equal ones have in common: everything but what the clock said."""
    found = {}
    for path in sorted(shelf.rglob("*")):
        name = str(path.relative_to(shelf))
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            found[name] = {
                key: (t.dtype, t.shape, t.numpy().tobytes()) for key, t in tensors.items()
            }
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata().get("model", "{}"))
            about.pop("ms", None)
            found[name]["model"] = about
        elif path.is_file():
            found[name] = path.read_bytes()
    return found
