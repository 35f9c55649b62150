"""What a Hub-Pathway returns in training mode."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..routing import Routing


class FusedExploit:
    """An exploit loss that was computed along with the aggregation, and what it is the loss of.

    It is given only to who asks for that very loss: targets that are the same tensor, unchanged
    since, and the same label smoothing. So is the router's loss, where it was computed, too: to who
    asks for the same temperature.
    """

    def __init__(
        self,
        loss: Tensor,
        target: Tensor,
        label_smoothing: float,
        router: Tensor | None = None,
        temperature: float | None = None,
    ):
        self._loss, self._target, self._version = loss, target, _version(target)
        self._label_smoothing = label_smoothing
        self._router, self._temperature = router, temperature

    def loss(self, target: Tensor, label_smoothing: float) -> Tensor | None:
        """The loss for these arguments; None where it was computed for others."""
        return self._loss if self._is_of(target, label_smoothing) else None

    def router(self, target: Tensor, label_smoothing: float, temperature: float) -> Tensor | None:
        """The router's loss for these arguments; None where there is none."""
        same = self._is_of(target, label_smoothing) and temperature == self._temperature
        return self._router if same else None

    def _is_of(self, target: Tensor, label_smoothing: float) -> bool:
        same = target is self._target and _version(target) == self._version
        return same and label_smoothing == self._label_smoothing


class _Output(NamedTuple):
    prediction: Tensor  # [N, C, ...]
    expert_outputs: Tensor  # [R, C, ...], in row order
    routing: Routing


class PathwayOutput(_Output):
    """What the model returns in training mode: (prediction, expert_outputs, routing).

    ``fused_exploit`` is there where the model was given the targets (see ``HubPathway.forward``);
    it is no part of the tuple.
    """

    fused_exploit: FusedExploit | None = None


def _version(tensor: Tensor) -> int | None:
    """How often it was written to in place; tensors of inference mode do not count that."""
    return None if tensor.is_inference() else tensor._version
