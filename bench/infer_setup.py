"""What bench.infer measures: a hub, saved and exported, and images that ask all of its experts.

Weights are random unless a saved model is given: time does not depend on them. But routes do, and
at its start a router's scores are all equal; so they are spread, until images go to all experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import hubpath_fast as hp
from hubpath_fast.checkpoints import SavedModel
from hubpath_fast.serving.exporting import tells_classes
from hubpath_fast.serving.images import draw, draw_covering

from .children import first_line
from .infer_latency import Experts
from .infer_rows import Answer, Row, open_row, size_on_disk

K = 2
FORMS = ("sparse", "cond", "dense", "parts")
MODEL, FROZEN = "model", "frozen model"
TOLERANCE = 1e-4  # of a probability: float32 sums in another order; the one of a package's proof
CHECKED = 8  # images that each row is asked about before it is timed
PHOTO, QUALITY, PHOTOS = 512, 90, 64  # pixels a side of a JPEG, Pillow's quality, how many of them


@dataclass(frozen=True)
class Preset:
    """hub: names of experts. size: pixels a side. outputs: C."""

    hub: str
    size: int
    outputs: int


PRESETS = {
    "tiny": Preset("tiny", 96, 10),
    "homogeneous": Preset("paper-homogeneous", 224, 100),
    "heterogeneous": Preset("paper-heterogeneous", 224, 100),
}


def make_model(preset: Preset) -> hp.HubPathway:
    """A hub of random weights, in evaluation mode, whose router tells images apart."""
    torch.manual_seed(0)
    model = hp.create_model(preset.hub, preset.outputs, K, pretrained=False, input_size=preset.size)
    model = model.to(memory_format=torch.channels_last).eval()
    spread(model, draw(64, 3, preset.size, torch.Generator().manual_seed(1)))
    return model


def read_model(folder: Path | None, preset: Preset) -> hp.HubPathway:
    """A saved model, or the preset's. ValueError: none, or one that does not tell classes."""
    if folder is None:
        return make_model(preset)
    model = hp.from_pretrained(folder)
    if not tells_classes(model, model.origin.input_size):
        raise ValueError(
            f"--model: expected a hub that tells classes, whose answers are probabilities; that in "
            f"{folder} has another task"
        )
    return model


@torch.no_grad()
def spread(model: hp.HubPathway, images: Tensor) -> None:
    """Lets scores differ by image, as much for each expert and with an equal mean."""
    head = model.generator.clean
    nn.init.normal_(head.weight)
    nn.init.zeros_(head.bias)
    clean, _ = model.generator(images / 255)
    std = clean.std(dim=0)
    head.weight /= std[:, None]
    head.bias.copy_(-clean.mean(dim=0) / std)


@dataclass(frozen=True)
class Questions:
    """images: uint8 [N, 3, S, S] on the host. asked: [N], the experts that each asks. answers:
    probabilities [n, C] of the first images; by_expert: [n, M, C], each expert's own."""

    images: Tensor
    asked: tuple[Experts, ...]
    answers: Tensor
    by_expert: Tensor


@torch.no_grad()
def make_questions(model: hp.HubPathway, count: int) -> Questions:
    """Of images that between them ask every expert, if any do; model: in evaluation mode."""
    images = draw_covering(model, model.origin.input_size, count).images
    device, asked = model.input_mean.device, []
    for part in images.split(16):
        experts = model.route(part.to(device)).experts
        asked += [tuple(sorted(set(of_image))) for of_image in experts.tolist()]
    some = images[:CHECKED].to(device)
    answers = model(some).softmax(dim=1).cpu()
    by_expert = model.ask_all(some).softmax(dim=2).cpu()
    return Questions(images, tuple(asked), answers, by_expert)


def write_photos(folder: Path) -> list[Path]:
    """JPEG files as large as they may come from a camera's gallery; always the same."""
    from PIL import Image

    paths = []
    folder.mkdir()
    for index, image in enumerate(draw(PHOTOS, 3, PHOTO, torch.Generator().manual_seed(2))):
        paths.append(folder / f"{index:02d}.jpg")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1], quality=QUALITY)
    return paths


def export_all(
    model: hp.HubPathway, folder: Path, forms: Sequence[str], device: str
) -> tuple[list[Row], dict[str, str]]:
    """(rows of the packages, why there is none, by row); model: on the CPU."""
    rows, notes = [], {}
    for form in forms:
        in_parts = form == "parts"
        path = folder / (form if in_parts else f"{form}.pt2")
        what = {"format": "parts"} if in_parts else {"form": form}
        try:
            hp.export(model, path, device=device, **what)
        except Exception as error:  # a row that fails says why, and the others are measured
            notes[form] = f"not exported: {first_line(error)}"
            continue
        kind = "parts" if in_parts else "program"
        rows.append(Row(form, kind, str(path), form != "dense", bytes=size_on_disk(path)))
    return rows, notes


def save(model: hp.HubPathway, folder: Path) -> tuple[list[Row], list[Row]]:
    """Saves the model: the rows of itself, and of each of its experts."""
    model.save_pretrained(folder)
    whole, path = size_on_disk(folder), str(folder)
    ours = [Row(MODEL, "model", path, True, bytes=whole),
            Row(FROZEN, "frozen", path, True, bytes=whole)]  # fmt: skip
    files = SavedModel(folder).files()
    mean, std = (tuple(map(tuple, v.tolist())) for v in (model.input_mean, model.input_std))
    singles = []
    for index, label in enumerate(model.origin.labels):
        own = {file for name, file in files.items() if name.startswith(f"experts.{index}.")}
        size = sum(map(size_on_disk, own))
        singles.append(Row(label, "experts", path, False, (index,), size, mean, std))
    return ours, singles


def ensemble_of(singles: Sequence[Row], seconds: Sequence[float], k: int) -> Row:
    """The K experts whose own seconds are nearest to the mean of all, as one row."""
    mean = sum(seconds) / len(seconds)
    near = sorted(range(len(seconds)), key=lambda index: abs(seconds[index] - mean))[:k]
    size = sum(singles[index].bytes for index in near)
    chosen = tuple(sorted(near))
    return dataclasses.replace(singles[0], name=f"ensemble of {k}", experts=chosen, bytes=size)


def open_checked(
    rows: Sequence[Row], questions: Questions, device: str
) -> tuple[dict[str, Answer], dict[str, str]]:
    """(what answers, why nothing does, by row). One that says something else is never timed."""
    answers: dict[str, Answer] = {}
    notes: dict[str, str] = {}
    for row in rows:
        try:
            answer = open_row(row, device)
            found = answer(questions.images[:CHECKED])
        except Exception as error:
            notes[row.name] = f"does not run: {first_line(error)}"
            continue
        expected = questions.answers
        if row.experts:
            expected = questions.by_expert[:, list(row.experts)].mean(dim=1)
        apart = (found.float() - expected).abs().max().item()
        if apart <= TOLERANCE:  # false of NaN
            answers[row.name] = answer
        else:
            notes[row.name] = f"wrong: it differs from the model by {apart:.1e}; not timed"
    return answers, notes


def from_file(answer: Answer, size: int) -> Callable[[Path], Tensor]:
    """The same from an image file: decoded, resized and cropped as ``hubpath predict`` does it."""
    from hubpath_fast.data import load_image
    from hubpath_fast.data.transforms import eval_transform

    transform = eval_transform(size)
    return lambda path: answer(transform(load_image(path))[None])


def named(experts: Experts, labels: Sequence[str]) -> list[str]:
    return [labels[index] for index in experts]


def generator_of(model: hp.HubPathway) -> Callable[[Tensor], Tensor]:
    """The router's scores of images alone, from the host to the host."""
    device, dtype = model.input_mean.device, model.input_mean.dtype

    @torch.no_grad()
    def scores(images: Tensor) -> Tensor:
        return model.generator(images.to(device).to(dtype) / 255)[0].cpu()

    return scores
