"""One expert of a hub alone, fine-tuned like any network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hub import Expert


class SingleModel(nn.Module):
    """An expert that takes the same images as a Hub-Pathway: uint8, or floats in [0, 1].

    images [N, 3, S, S] -> logits [N, C]; the expert's own normalisation is applied inside.
    """

    def __init__(self, expert: Expert):
        super().__init__()
        self.module = expert.module
        self.register_buffer("mean", torch.tensor(expert.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(expert.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return self.module((images - self.mean) / self.std)
