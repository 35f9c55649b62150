"""A model as a folder of packages, one for the router and one for each expert.

What ``hubpath_fast.serve`` runs, with torch alone. The form that never fails for the routing's
sake: there is no program that would have to say which expert runs, so each has only its own network
in it. The parts' arithmetic is that of the other forms, see ``forms``.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import serve
from ..files import write_json
from ..model import HubPathway, always_on
from .errors import expert_name, refusing
from .forms import blank, make_form
from .images import reachable
from .programs import EXAMPLE, any_batch, quiet, without_traces


class Router(nn.Module):
    """uint8 images [N, 3, S, S] -> (experts int64 [N, K], weights [N, K])."""

    def __init__(self, model: HubPathway, size: int):
        super().__init__()
        self.form = make_form(model, "dense", size, probabilities=False, routing=True)
        # Of the experts, it has the one alone whose features it looks at.
        watched = always_on(model.generator)
        self.form.experts = nn.ModuleList([] if watched is None else [watched.source.module])
        self.form.aggregator = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = self.form.route(images)
        return experts, weights


class OneExpert(nn.Module):
    """uint8 images [n, 3, S, S] -> one expert's outputs [n, C, ...]."""

    def __init__(self, model: HubPathway, index: int, size: int):
        super().__init__()
        self.form = make_form(model, "dense", size, probabilities=False, routing=False)
        others = [nn.Identity() for _ in model.experts]
        self.form.experts = nn.ModuleList([*others[:index], model.experts[index]])
        self.form.generator, self.form.aggregator = nn.Identity(), nn.Identity()
        self.index = index

    def forward(self, images: Tensor) -> Tensor:
        return self.form.outputs(self.index, images)


class Aggregate(nn.Module):
    """The concatenation [N, M*C, ...] -> the answer: probabilities [N, C], or [N, C, ...]."""

    def __init__(self, model: HubPathway, probabilities: bool):
        super().__init__()
        self.aggregator, self.probabilities = model.aggregator, probabilities

    def forward(self, concat: Tensor) -> Tensor:
        answer = self.aggregator(concat)
        return torch.softmax(answer, dim=1) if self.probabilities else answer


@torch.no_grad()
def write_parts(model: HubPathway, folder: Path, size: int, probabilities: bool) -> dict[str, Any]:
    """Writes the packages of a model in evaluation mode, and ``serve.py``, into an empty folder.

    BatchNorm is folded first, in a copy: see ``HubPathway.freeze_for_inference``.

    Returns:
        What ``parts.json`` says of them: "parts", "router", "experts", "aggregator".

    Raises:
        ExportError: a part cannot be exported; it names it.
    """
    images, labels, kept = blank(model, EXAMPLE, size), model.origin.labels, reachable(model)
    if model.frozen is None:
        model = copy.deepcopy(model)
        model.executor = "sequential"
        for i in set(range(len(labels))) - kept:  # no part of the package
            model.experts[i] = nn.Identity()
        random = torch.Generator().manual_seed(0)
        drawn = torch.randint(256, images.shape, generator=random, dtype=torch.uint8)
        model.freeze_for_inference(example=drawn.to(images.device))
    (folder / "experts").mkdir()
    shutil.copyfile(serve.__file__, folder / "serve.py")
    router = save(Router(model, size), images, folder, "router.pt2", "the router")
    experts: list[dict[str, Any] | None] = [None] * len(labels)
    for i in sorted(kept):
        file = f"experts/{i:02d}-{file_name(labels[i])}.pt2"
        experts[i] = {"label": labels[i]} | save(
            OneExpert(model, i, size), images, folder, file, expert_name(model, i)
        )
    outputs = OneExpert(model, min(kept), size)(images)
    concat = outputs.new_zeros(EXAMPLE, len(labels) * outputs.shape[1], *outputs.shape[2:])
    part = Aggregate(model, probabilities)
    aggregator = save(part, concat, folder, "aggregator.pt2", "the aggregator")
    return {
        "parts": serve.VERSION,
        "router": router,
        "experts": experts,
        "aggregator": aggregator,
    }


def save(part: nn.Module, example: Tensor, folder: Path, file: str, name: str) -> dict[str, Any]:
    """Exports a part for any number of images, and writes it.

    Returns:
        "file", "bytes" and "sha256".
    """
    path, shapes = folder / file, (any_batch(example.device),)
    with refusing(name), quiet():
        program = torch.export.export(part.eval(), (example,), dynamic_shapes=shapes, strict=False)
        torch.export.save(without_traces(program), path)
    return {"file": file, "bytes": path.stat().st_size, "sha256": serve.file_hash(path)}


def write_index(folder: Path, about: dict[str, Any]) -> None:
    write_json(folder / serve.INDEX, about)


def check_target(folder: Path) -> None:
    """Raises ValueError where a folder that is to be replaced is no package in parts."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not is_parts(folder):
        raise ValueError(
            f"path: expected a folder that does not exist, is empty, or holds a package in parts, "
            f"got {folder}, which holds something else; choose another"
        )


def is_parts(folder: Path) -> bool:
    try:
        return "parts" in json.loads((folder / serve.INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def file_name(label: str) -> str:
    """A label as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "expert"
