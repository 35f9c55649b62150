"""That a package says what its model says: asked in a process of its own, image by image.

An exported program that is wrong says nothing of it. One that was traced may keep the route of its
example for every later image (an expert that the example did not ask is then no part of it), and a
compiler may get a network wrong. So a package is opened in a fresh process that has neither this
package nor timm, and asked about images that between them want every expert, in batches of several
sizes. An expert that no image reaches is reached by its score: the package's buffer ``score_shift``
is set for one more question, and the model's scores are moved by as much.

Shapes: N images, M experts, K active ones, C outputs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..devices import full_float32
from ..model import HubPathway
from . import run_package
from .errors import ExportError, expert_name
from .images import ENOUGH, Drawn, clear_choice, draw_covering, penalized

IMAGES = 64
BATCHES = (1, 2, 7, 64)
ABOVE = 1.0  # how far an expert's score is brought above the sum of all others
OF_SHIFTED = 8  # images for an expert that is reached by its score
TOLERANCE = 1e-4
AT_ONCE = 16  # images that the model is asked at once
# Of a process by itself: neither the folder that it is started in nor its user's settings.
PYTHON = (sys.executable, "-I")


@dataclass(frozen=True)
class Ask:
    """Images first..last-1 of the proof's, ``batch`` at a time. expert: whom the question is for,
    since no image asks it; None: all. shift: [M], added to the scores for that; None: nothing."""

    first: int
    last: int
    batch: int
    expert: int | None = None
    shift: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Expected:
    """What the model says: answer [n, C, ...], experts [n, K], weights [n, K]."""

    answer: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Proof:
    """images: how many. asked: [M], how many of them want each expert. by_score: the experts that
    were reached by their score. difference: the largest, of answers and of weights."""

    images: int
    batches: tuple[int, ...]
    asked: tuple[int, ...]
    by_score: tuple[int, ...]
    difference: float
    tolerance: float


@torch.no_grad()
@full_float32()  # as ``run_package``: TF32 rounds by more than is allowed
def prove(
    package: Path,
    format: str,
    model: HubPathway,
    size: int,
    probabilities: bool,
    routing: bool,
    batch: int | None,
    room: Path,
) -> Proof:
    """Compares a package with its model, which is in evaluation mode on the package's device.

    Args:
        batch: the one batch size that the package takes; None: any.
        room: a folder to write into.

    Raises:
        ExportError: the package does not run by itself, or says something else; then it names the
            expert and the batch.
    """
    batches = BATCHES if batch is None else (batch,)
    count = IMAGES if batch is None else -(-IMAGES // batch) * batch
    drawn = draw_covering(model, size, count)
    asks = [Ask(0, count, each) for each in batches]
    for index in drawn.unasked:
        asks += shifted_asks(model, drawn, index, batch)
    known: dict[tuple, Expected] = {}
    for ask in asks:
        about = ask.first, ask.last, ask.shift
        if about not in known:
            images = drawn.images[ask.first : ask.last]
            known[about] = ask_model(model, images, ask.shift, probabilities)
            check_reached(model, ask, known[about])
    answers = ask_package(package, format, str(model.input_mean.device), drawn.images, asks, room)
    difference, tolerance = 0.0, tolerance_of(model)
    for ask, outputs in zip(asks, answers, strict=True):
        expected = known[ask.first, ask.last, ask.shift]
        found = compare(model, ask, expected, outputs, routing, tolerance)
        difference = max(difference, found)
    experts = known[0, count, None].experts
    counts = tuple(int((experts == index).any(1).sum()) for index in range(len(model.experts)))
    return Proof(count, batches, counts, drawn.unasked, difference, tolerance)


def tolerance_of(model: HubPathway) -> float:
    """Of a probability: ``TOLERANCE`` in float32; in a narrower type eight of its roundings."""
    dtype = model.experts_dtype or model.input_mean.dtype
    return TOLERANCE if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps


def shifted_asks(model: HubPathway, drawn: Drawn, index: int, batch: int | None) -> list[Ask]:
    """Questions to expert ``index``, its score as far up as brings it to the top of each image."""
    scores, count = penalized(model, drawn.scores), drawn.scores.shape[1]
    lift = float((scores.amax(dim=1) - scores[:, index]).max()) + ABOVE + math.log(count)
    shift = [0.0] * count
    shift[index] = lift
    clear = clear_choice(model, drawn.scores + torch.tensor(shift))
    batches = (1, 7) if batch is None else (batch,)
    length = OF_SHIFTED if batch is None else batch
    starts = range(0, len(clear) - length + 1, length)
    first = max(starts, key=lambda start: sum(clear[start : start + length]))
    return [Ask(first, first + length, each, index, tuple(shift)) for each in batches]


def ask_model(
    model: HubPathway, images: Tensor, shift: Sequence[float] | None, probabilities: bool
) -> Expected:
    """What the model itself says of images."""
    device, parts = model.input_mean.device, []
    moved = contextlib.nullcontext() if shift is None else scores_moved(model, shift)
    with moved:
        for x in images.to(device).split(AT_ONCE):
            routing = model.route(x)
            answer = model(x, routing=routing)
            answer = answer.softmax(dim=1) if probabilities else answer
            parts.append((answer, routing.experts, routing.weights))
    answer, experts, weights = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    answer = answer.double().numpy()
    if not np.isfinite(answer).all():
        raise ExportError(
            "model: its own outputs are not all finite (NaN or infinity) on images of noise and "
            "gradients, so nothing can be compared with them; check its weights"
        )
    return Expected(answer, experts.numpy(), weights.double().numpy())


def check_reached(model: HubPathway, ask: Ask, expected: Expected) -> None:
    """Raises ExportError unless the expert that a question is for decides each of its answers."""
    if ask.expert is None:
        return
    weights = np.where(expected.experts == ask.expert, expected.weights, 0).max(1)
    if not (weights >= ENOUGH).all():
        raise ExportError(
            f"{expert_name(model, ask.expert)}: no image asks it with a "
            f"weight of {ENOUGH}, nor does its score, {max(ask.shift):.3g} higher, bring it there, "
            "so nothing would tell whether the package has it right; look at the router's weights "
            "and the policy"
        )


@contextlib.contextmanager
def scores_moved(model: HubPathway, shift: Sequence[float]) -> Iterator[None]:
    """The model's router gives scores that are ``shift`` [M] higher meanwhile."""
    handle = model.generator.register_forward_hook(
        lambda _, args, scores: (scores[0] + scores[0].new_tensor(shift), scores[1])
    )
    try:
        yield
    finally:
        handle.remove()


def ask_package(
    package: Path,
    format: str,
    device: str,
    images: Tensor,
    asks: Sequence[Ask],
    room: Path,
) -> list[list[np.ndarray]]:
    """The outputs of a package, of each question, as a process without this package gets them."""
    job = {
        "format": format,
        "package": str(package.resolve()),
        "device": device,
        "path": library_folders(),
        "asks": [
            {"first": a.first, "last": a.last, "batch": a.batch, "score_shift": a.shift}
            for a in asks
        ],
    }
    (room / "job.json").write_text(json.dumps(job), encoding="utf-8")
    np.save(room / "images.npy", images.numpy())
    run_isolated(room)
    answers = []
    for number in range(len(asks)):
        files = sorted(room.glob(f"answer-{number}-*.npy"))
        answers.append([np.load(file) for file in files])
    return answers


def run_isolated(room: Path) -> None:
    """Runs ``run_package`` in a process of its own. ExportError: it failed."""
    command = [*PYTHON, str(Path(run_package.__file__).resolve()), str(room.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"status {done.returncode}"
        raise ExportError(f"the package does not run in a process without hubpath_fast: {reason}")


def library_folders() -> list[str]:
    """Where the libraries lie that a package may need; isolated, Python leaves out a user's own."""
    found = map(importlib.util.find_spec, ("torch", "numpy", "onnxruntime"))
    return list({str(Path(s.origin).parents[1]): None for s in found if s is not None})


def compare(
    model: HubPathway,
    ask: Ask,
    expected: Expected,
    outputs: Sequence[np.ndarray],
    routing: bool,
    tolerance: float,
) -> float:
    """The largest difference of an answer; of outputs that are no probabilities, in units of the
    largest of them, where that is above 1. Raises ExportError where it is too large."""
    answer, experts = expected.answer, expected.experts
    if outputs[0].shape != answer.shape:
        raise ExportError(
            f"the package's answer is of shape {list(outputs[0].shape)} at batch {ask.batch}, the "
            f"model's of {list(answer.shape)}"
        )
    scale = max(1.0, float(np.abs(answer).max()))
    apart = np.abs(outputs[0].astype(np.float64) - answer).reshape(len(answer), -1).max(1) / scale
    if routing:
        weights = np.abs(outputs[2].astype(np.float64) - expected.weights).max(1)
        other = (outputs[1] != experts).any(1)
        apart = np.where(other, np.inf, np.maximum(apart, weights))
    wrong = ~(apart <= tolerance)  # true of NaN
    if wrong.any():
        index = ask.expert  # the others' images were compared before
        if index is None:
            index = blamed(wrong, apart, experts, len(model.experts))
        raise ExportError(
            f"{expert_name(model, index)}: the package differs from the model by "
            f"{float(np.nanmax(apart)):.2g} at batch {ask.batch}, on {int(wrong.sum())} of "
            f"{len(wrong)} images; allowed are {tolerance:.1g}, so nothing was written"
        )
    return float(apart.max())


def blamed(wrong: np.ndarray, apart: np.ndarray, experts: np.ndarray, count: int) -> int:
    """The expert of which the largest share of its images [n] is wrong; of equals, the one whose
    images are the furthest apart in the mean."""
    found = {}
    for index in range(count):
        own = (experts == index).any(1)
        if own.any():
            far = np.nan_to_num(apart[own], nan=np.inf, posinf=1e30).mean()
            found[index] = float(wrong[own].mean()), float(far)
    return max(found, key=found.__getitem__)
