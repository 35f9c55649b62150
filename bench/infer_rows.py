"""What bench.infer asks: the rows of its table, and how each is opened from what lies on disk.

Every row takes uint8 images [N, 3, S, S] on the host and answers with probabilities [N, C] on the
host, normalisation included: what a service pays. A package is opened without hubpath_fast.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """name: in the table. kind: one of ``KINDS``. path: of the package, or of the saved model's
    folder. routed: whether what an answer costs depends on the image. bytes: on disk.

    Of the kind "experts", experts: the numbers of those that it is; mean, std: [M][channels], of
    the images of each of the hub's.
    """

    name: str
    kind: str
    path: str
    routed: bool = False
    experts: tuple[int, ...] = ()
    bytes: int = 0
    mean: tuple[tuple[float, ...], ...] = ()
    std: tuple[tuple[float, ...], ...] = ()


class Ensemble(nn.Module):
    """The mean of some experts' probabilities, every one of them asked about every image."""

    def __init__(self, experts: list[nn.Module], mean: Tensor, std: Tensor):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.register_buffer("scale", (1 / (std * 255))[:, :, None, None])
        self.register_buffer("shift", (-mean / std)[:, :, None, None])

    def forward(self, images: Tensor) -> Tensor:
        answers = []
        for index, expert in enumerate(self.experts):
            x = images * self.scale[index] + self.shift[index]
            if next(expert.parameters()).is_contiguous(memory_format=torch.channels_last):
                x = x.contiguous(memory_format=torch.channels_last)
            answers.append(expert(x).softmax(dim=1))
        return torch.stack(answers).mean(dim=0)


def _model(row: Row, device: str) -> Answer:
    import hubpath_fast as hp

    model = hp.from_pretrained(row.path, device=device)
    return lambda images: model(images).softmax(dim=1)


def _frozen(row: Row, device: str) -> Answer:
    import hubpath_fast as hp

    model = hp.from_pretrained(row.path, device=device).freeze_for_inference()
    return lambda images: model(images).softmax(dim=1)


def _experts(row: Row, device: str) -> Answer:
    import hubpath_fast as hp

    experts = [hp.load_expert(row.path, index, device) for index in row.experts]
    mean, std = (torch.tensor([v[index] for index in row.experts]) for v in (row.mean, row.std))
    return Ensemble(experts, mean, std).to(device).eval()


def _program(row: Row, device: str) -> Answer:
    return torch.export.load(row.path).module()


def _parts(row: Row, device: str) -> Answer:
    """By the folder's own copy of ``hubpath_fast.serve``."""
    spec = importlib.util.spec_from_file_location("serve", Path(row.path) / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    return serve.Parts(row.path, device=device)


OURS = ("torch", "hubpath_fast", "timm")
# How each is opened, and the libraries that it needs: importing those is no part of loading.
KINDS: dict[str, tuple[Callable[[Row, str], Answer], tuple[str, ...]]] = {
    "model": (_model, OURS),
    "frozen": (_frozen, OURS),
    "experts": (_experts, OURS),
    "program": (_program, ("torch", "torch.export")),
    "parts": (_parts, ("torch", "torch.export")),
}


def open_row(row: Row, device: str) -> Answer:
    """What answers: uint8 [N, 3, S, S] -> probabilities [N, C], from the host to the host."""
    answer = KINDS[row.kind][0](row, device)

    @torch.no_grad()
    def ask(images: Tensor) -> Tensor:
        return answer(images.to(device)).cpu()

    return ask


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def to_dict(row: Row) -> dict[str, Any]:
    return dict(vars(row))
