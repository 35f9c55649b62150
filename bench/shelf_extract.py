"""How much of an extraction the bodies are: decoding, reading, building and writing beside them.

    python -m bench.shelf_extract [--models 5] [--name resnet50] [--images 48] [--px 224]
                                  [--views 1] [--threads 1]

Generated JPEGs of 500 x 375 pixels, as many as given, lie in a temporary folder; models of random
weights, one of each set of weights that the library has of an architecture, compute their features
by ``hubpath shelf extract``. The goal, for five ResNet-50 at 224 px: 80 % of the seconds in bodies,
and as many decodes as images, however many models.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hubpath_fast.hub import list_models
from hubpath_fast.recipes.shelf_extract import ExtractSettings, extract_shelf, summary

from . import records

GOAL = 0.8  # of the seconds, in bodies
WIDTH, HEIGHT, QUALITY = 500, 375, 90  # as photographs of ImageNet are


def write_photos(root: Path, count: int) -> None:
    """JPEGs of blurred noise, which are as large as photographs, in two classes."""
    draw = np.random.default_rng(0)
    for i in range(count):
        small = draw.integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
        folder = root / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.jpg", quality=QUALITY)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--name", default="resnet50", help="an architecture of timm")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    names = list_models(f"timm/{options.name}.*")[: options.models]
    if len(names) < options.models:
        parser.error(f"--models: timm has {len(names)} sets of weights of {options.name}")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder, "photos")
            write_photos(photos, options.images)
            asked = ExtractSettings(
                data=str(photos), views=options.views, image_size=options.px, validation=0.2,
                pretrained=False,
            )  # fmt: skip
            done = extract_shelf(Path(folder, "shelf"), names, asked)
    finally:
        torch.set_num_threads(before)
    about = records.environment("cpu")
    print(
        f"{options.models} {options.name} of random weights, {options.images} JPEGs, "
        f"{options.views} views at {options.px} px; {about['device']}, torch {torch.__version__}, "
        f"{options.threads} threads"
    )
    print("\n".join(summary(done)))
    share = done.body_seconds / done.seconds
    print(f"bodies: {share:.1%} of {done.seconds:.1f} s (goal {GOAL:.0%})")
    print(f"decodes: {done.decodes} of {done.images} images for {len(done.computed)} models")


if __name__ == "__main__":
    main()
