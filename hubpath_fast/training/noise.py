"""The pathway noise of a training step: of (seed, step) and each sample's place in the batch.

So it depends neither on micro-batches nor on the number of ranks, and a resumed run needs no
generator's state to go on with the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .._noise_draw import NoiseDraw
from ..data.order import mix
from ..model import HubPathway


@contextmanager
def step_noise(model: nn.Module, seed: int, step: int, first: int) -> Iterator[None]:
    """Within, a Hub-Pathway draws the noise of ``step`` for samples from place ``first`` on.

    first: the place of the call's first sample in the batch of all ranks. Of a model that is no
    Hub-Pathway nothing changes.
    """
    if not isinstance(model, HubPathway):
        yield
        return
    before, model.noise_draw = model.noise_draw, NoiseDraw(mix(seed, "noise", step), first)
    try:
        yield
    finally:
        model.noise_draw = before
