"""Checks of exported packages of a small hub.

Each is proved by ``hp.export`` itself, which opens it in a fresh process without this package, and
compares it with the model on the same device.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import hubpath_fast as hp

from .check_executors import NETWORKS, PX
from .children import Write, first_line

M, K = 3, 2
# By what they are for; the first is the form that each becomes where nothing is in the way.
FORMS = {
    "any batch": ("sparse", {}),
    "one image": ("cond", {"batch": 1}),
    "parts": ("parts", {"format": "parts"}),
}


def hub() -> hp.HubPathway:
    """Whose scores differ by image, and whose experts normalise theirs differently."""
    torch.manual_seed(0)
    experts = [NETWORKS["BatchNorm"]() for _ in range(M)]
    mean = torch.rand(M, 3)
    generator = hp.PathwayGenerator(M, width=4, stride=1)
    nn.init.normal_(generator.clean.weight, std=4.0)
    return hp.HubPathway(experts, generator, k=K, normalization=(mean, mean + 0.5)).eval()


def packages(write: Write, device: str) -> None:
    """A line for each: its form, and the largest difference that its proof found."""
    model = hub().to(device)
    for title, (form, options) in FORMS.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / ("parts" if form == "parts" else "hub.pt2")
                made = hp.export(model, path, device=device, input_size=PX, **options)
        except Exception as failure:
            write(f"package of {title}", ok=False, note=first_line(failure))
            continue
        if made.form == form:
            write(f"package of {title}", error=float(made.largest_difference))
        else:
            tried = "; ".join(f"{one['form']}: {one['reason']}" for one in made.about["tried"])
            write(f"package of {title}", ok=False, note=f"it became {made.form}: {tried}"[:300])
