"""The states of every random generator a training step may draw from, as plain types."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..data.order import mix


def seed_all(seed: int) -> None:
    """Seed Python, numpy (which takes 32 bits) and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Seed a rank but the first when it starts training, or goes on, at a step.

    The first has what one process has: ``seed_all``, or the state in the checkpoint. The others
    draw for other rows, so their generators differ; what is drawn inside experts, such as dropout,
    is so independent of the number of ranks in distribution, not to the bit.
    """
    seed_all(mix(seed, "rank", rank, step))


def random_state(device: torch.device) -> dict[str, Any]:
    """States of Python, numpy, torch on the CPU and, for a CUDA device, torch on that device."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what :func:`random_state` returned; a state of the GPU is used on a GPU only."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
