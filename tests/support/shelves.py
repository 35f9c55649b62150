"""Small shelves of made-up features, in which each model knows one kind of image; hubs on them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from hubpath_fast.features import Shelf, write_shelf
from hubpath_fast.shelf.heads import fit_heads
from hubpath_fast.shelf.run import ShelfHub, build, open_hub
from hubpath_fast.shelf.save import save_hub
from hubpath_fast.shelf.settings import ShelfFitSettings


def make_shelf(
    folder: Path,
    num_models: int = 4,
    classes: int = 3,
    sizes: tuple[int, int, int] = (60, 30, 30),
    dims: tuple[int, ...] = (5, 8, 6, 7),
    dtype: torch.dtype = torch.float32,
    views: int = 1,
    seed: int = 0,
    source_classes: int = 0,
    router_size: int | None = 8,
) -> Shelf:
    """A shelf whose image j is of kind ``j % num_models``, which model ``j % num_models`` tells the
    classes of, and the others see as noise; its pixels show the kind by their grey level.

    dims: D of the models, in turn. source_classes: S of a random source head of each; 0: none.
    """
    draw = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    targets = torch.randint(classes, (count,), generator=draw)
    kinds = torch.arange(count) % num_models
    features, heads, about = {}, {}, {}
    for i in range(num_models):
        dim = dims[i % len(dims)]
        means = 3 * torch.randn(classes, dim, generator=draw)
        known = means[targets] * (kinds == i)[:, None]
        noise = torch.randn(views, count, dim, generator=draw)
        features[f"model{i}"] = (known + noise).to(dtype)
        about[f"model{i}"] = {"parameters": 1000 * (i + 1), "ms": 0.5 * (i + 1), "flops": 10**6}
        if source_classes:
            weight = torch.randn(source_classes, dim, generator=draw)
            heads[f"model{i}"] = weight, torch.randn(source_classes, generator=draw)
    pixels = None
    if router_size is not None:
        level = (kinds * 255 // max(1, num_models - 1)).to(torch.uint8)
        pixels = level.view(1, -1, 1, 1, 1).repeat(views, 1, 3, router_size, router_size)
    splits = dict(zip(("train", "validation", "test"), sizes, strict=True))
    return write_shelf(
        folder, features, targets, [f"class{c}" for c in range(classes)], splits, pixels, heads,
        about,
    )  # fmt: skip


def make_hub(
    shelf: Shelf, models: Iterable[int], folder: Path | None = None, spread: float = 1.0, **settings
) -> ShelfHub:
    """A hub of SHELF/hub, or of the folder, with fitted heads and a router at random, whose scores
    are a function of the images' grey level. spread: of the weights that they are made with."""
    folder, models = folder or shelf.folder / "hub", tuple(models)
    settings = ShelfFitSettings(generator_width=4, **settings)
    torch.manual_seed(0)
    model = build(shelf, models, settings, fit_heads(shelf, models)).eval()
    nn.init.normal_(model.generator.clean.weight, std=spread)
    save_hub(ShelfHub(folder, shelf, model, models, settings), folder)
    return open_hub(folder)
