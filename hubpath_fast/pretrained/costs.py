"""What an image costs a saved model, for its card: measured when it is saved.

A run's ``result.json`` has none of this: it is the same however often a run is finished again, and
times are not.
"""

from __future__ import annotations

from typing import Any

import torch

from ..baselines.costs import BATCH, inference_costs
from ..devices import eval_mode
from ..executors.remembered import device_name
from ..model import HubPathway


def measured_costs(model: HubPathway, batch: int = BATCH) -> dict[str, Any]:
    """``inference_costs`` of drawn images of the model's size, with "batch", how many at once, and
    "device", its name. Modes and the random state stay as they are.

    Raises ValueError where the size of its images is not known.
    """
    size = model.origin.input_size
    if size is None:
        raise ValueError(
            "model: the size of its images is not known, since it was made of modules alone; "
            "build it by create_model, or leave the costs out"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    with eval_mode(model):
        costs = inference_costs(model, images)
    return {**costs, "batch": batch, "device": device_name(device)}
