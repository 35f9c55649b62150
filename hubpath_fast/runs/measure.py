"""What a trained model says about held-out images, and what memory a run held."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..devices import autocast
from ..model import HubPathway, answers, dense_weights
from ..model.expert_major import MEMORY, held_bytes
from ..routing import Routing
from ..training import Task


@torch.no_grad()
def predict(
    model: nn.Module,
    task: Task,
    batches: Iterable,
    device: str,
    amp: str = "none",
    expert_major: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What a model says, in evaluation mode.

    expert_major: of a Hub-Pathway: see ``HubPathway.predict_expert_major``.

    Returns:
        (predictions [n, P], float32 on the host, as the task stores them; of a Hub-Pathway each
        image's weight for each expert, [n, M] likewise, 0 where inactive, else None).
    """
    model.eval()
    predictions, weights, on = [], [], torch.device(device)
    if isinstance(model, HubPathway):
        for outputs, routing, _ in answers(model, batches, on, amp, expert_major):
            weights.append(weights_of(routing))
            predictions.append(task.predict(outputs).cpu())
    else:
        for images, _ in batches:
            with autocast(on, amp):
                outputs = model(images.to(on))
            predictions.append(task.predict(outputs).cpu())
    return torch.cat(predictions), torch.cat(weights) if weights else None


def weights_of(routing: Routing) -> Tensor:
    """[N, M], float32 on the host: each sample's weight for each expert, 0 where inactive. An
    active expert is told from the others even where its weight underflows to 0."""
    active = routing.weights.float().clamp_min(torch.finfo(torch.float32).tiny)
    return dense_weights(replace(routing, weights=active)).cpu()


def images_at_once(model: HubPathway, task: Task, image_size: int) -> int:
    """How many uint8 images fit in the memory that predictions expert by expert may hold."""
    row = 4 * math.prod(task.expected_shape(image_size))
    return max(1, MEMORY // held_bytes(3 * image_size**2, model.k, row))


class PeakMemory:
    """The most memory that a run held, in MiB, over what the process held before it: on a CUDA
    device torch's, else the process's resident set. None where neither is known (Windows)."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.before = self._now()

    def mebibytes(self) -> float | None:
        now = self._now()
        return None if now is None else (now - self.before) / 2**20

    def _now(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:
            return None
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
