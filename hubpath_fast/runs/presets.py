"""Runs by name: ``hubpath fit --preset NAME``. Every setting can still be given otherwise.

"paper-homogeneous" and "paper-heterogeneous" are the runs of the paper's section 4.1, on the data
set that ``--dataset`` names. What the paper states: the hubs, K = 2, SGD at 0.01 with momentum 0.9,
15,000 iterations of 48 images, the rate times 0.1 after 6,000 and 12,000. What an earlier code of
the same group adds: nesterov, weight decay 5e-4, heads drawn from N(0, 0.01) that learn at the
common rate, images resized to 256 x 256, crops of 224, flips, and ten-crop testing. What is left is
our choice: lambda = 0.5, a linear aggregator, and a tenth of train held out to choose the step on,
where that code looked at the test images (validation 0: train on all of it and choose nothing).

"landmarks-300w", "landmarks-wflw" and "landmarks-cofw" are the runs of section 4.2, with the
paper's homogeneous hub: Adam at 1e-4, 60 passes of 16 faces over all of train (197, 469 and 85
updates a pass), the rate times 0.1 after 30 and 50 of them, crops of 256 pixels, published targets.
Our choices: K = 2 and lambda, which the paper does not give for landmarks, and a tenth of train
held out by image to choose the step on, where the published code looked at the test faces.

"tiny" and "tiny-homogeneous" are the same run in small: five tiny networks with random weights, on
the handwritten digits that scikit-learn carries; no download, no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..data.named import DIGITS
from ..fields import there_are
from ..tasks.landmarks.layouts import FACES, LAYOUTS
from ..training import TrainerConfig
from .config import CLASSIFICATION, LANDMARKS

PAPER_TRAINER = TrainerConfig(
    steps=15_000,
    batch_size=48,
    optimizer="sgd",
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    lr_expert=0.01,
    lr_head=0.01,
    lr_router=0.01,
    schedule="steps",
    milestones=(6_000, 12_000),
    decay=0.1,
    eval_every=1_000,
    save_every=1_000,
)

_PAPER: dict[str, Any] = {
    "pretrained": True,
    "k": 2,
    "image_size": 224,
    "flip": True,
    "min_area": 0.08,
    "validation": 0.1,
    "crops": 10,
    "workers": None,
    "head_init": 0.01,
    "explore": 0.5,
    "aggregator": "linear",
    "generator_width": 16,
    "trainer": PAPER_TRAINER.to_dict(),
}
_SMALL = {
    "steps": 150,
    "milestones": (60, 120),
    "lr_expert": 0.05,  # random weights have further to go than pre-trained ones
    "lr_head": 0.05,
    "lr_router": 0.05,
    "eval_every": 50,
    "save_every": 50,
}
_TINY: dict[str, Any] = {
    **_PAPER,
    "dataset": DIGITS,
    "pretrained": False,
    "image_size": 32,
    "flip": False,  # a mirrored digit is none
    "min_area": 0.6,
    "crops": 5,
    "workers": 0,
    "trainer": PAPER_TRAINER.replace(**_SMALL).to_dict(),
}

PASSES, BATCH = 60, 16  # of the landmarks' protocol


def _landmarks(dataset: str) -> dict[str, Any]:
    a_pass = math.ceil(FACES[dataset]["train"] / BATCH)
    trainer = TrainerConfig(
        steps=PASSES * a_pass,
        batch_size=BATCH,
        optimizer="adamw",  # without weight decay it is Adam
        weight_decay=0.0,
        lr_expert=1e-4,
        lr_head=1e-4,
        lr_router=1e-4,
        schedule="steps",
        milestones=(30 * a_pass, 50 * a_pass),
        decay=0.1,
        eval_every=2 * a_pass,
        save_every=2 * a_pass,
    )
    return {
        "hub": ["paper-homogeneous"],
        "task": LANDMARKS,
        "dataset": dataset,
        LANDMARKS: {"targets": "published"},
        "pretrained": True,
        "k": 2,
        "image_size": 256,
        "flip": True,
        "validation": 0.1,
        "workers": None,
        "explore": 0.5,
        "aggregator": "linear",
        "generator_width": 16,
        "trainer": trainer.to_dict(),
    }


# What `hubpath fit` and `hubpath compare` begin with where neither a preset nor a file of settings
# is given. How they were chosen: docs/results.md, "Routing that pays". The fields' own defaults
# stay (but for the size of the router): older files of settings mean them.
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        CLASSIFICATION: {"head_init": 0.01, "router_supervision": 0.1},
        # Heads of maps are drawn as the papers on them draw theirs; see HeatmapHead. Losses of maps
        # differ by hundredths between experts, hence the temperature (docs/landmarks.md).
        LANDMARKS: {
            "task": LANDMARKS,
            "image_size": 256,
            "router_supervision": 1.0,
            "router_temperature": 0.1,
        },
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper-homogeneous": {"hub": ["paper-homogeneous"], **_PAPER},
        "paper-heterogeneous": {"hub": ["paper-heterogeneous"], **_PAPER},
        **{f"landmarks-{name}": _landmarks(name) for name in LAYOUTS},
        "tiny": {"hub": ["tiny"], **_TINY},
        "tiny-homogeneous": {"hub": ["tiny-homogeneous"], **_TINY},
    }
)


def preset(name: str) -> dict[str, Any]:
    """A copy of a preset's settings, as ``FitConfig.from_dict`` takes them; data may be missing."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; {there_are(PRESETS, name, most=1)}")
    values = dict(PRESETS[name])
    return {**values, "trainer": dict(values["trainer"])}
