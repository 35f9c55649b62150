"""What the router of a hub on a shelf costs: the bodies were timed while features were computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..baselines.costs import median_seconds
from ..devices import eval_mode
from ..model import HubPathway

IMAGES = 64  # scored at a time: about what predictions come in


@torch.no_grad()
def router_ms(model: HubPathway, numbers: Tensor) -> float:
    """Milliseconds an image for its scores. What the router looks at lies there: a model whose
    features these are is not counted. numbers: int64 [n], images that there are, n >= 1."""
    seen = numbers[:IMAGES].double()
    device = next(model.generator.parameters()).device
    seen = seen.to(device)
    with eval_mode(model):
        return 1e3 * median_seconds(lambda: model.scores(seen), device) / len(seen)
