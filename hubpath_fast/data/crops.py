"""Evaluation on several crops of each image, as the paper's group reports it."""

from __future__ import annotations

from torch import Tensor, nn


class SummedCrops(nn.Module):
    """A classifier for several crops of each image: its outputs, averaged over the crops.

    The mean chooses the class that the sum of the logits chooses, and keeps their scale, so that a
    cross-entropy of it means something.

    model: [B, 3, S, S] -> [B, C]. Input: [B, crops, 3, S, S] (``eval_transform(size, crops)``); the
    crops go through one after another, so that memory is that of one. Output: [B, C].
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return sum(map(self.model, images.unbind(1))) / images.shape[1]
