"""What is minimised: the settings of the losses."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import Settings, setting


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """Weights and smoothing of the losses; see ``Task.criterion``."""

    explore: float = setting(0.5, "lambda, weight of the exploration loss", low=0)
    label_smoothing: float = setting(
        0.0, "of the cross-entropy that is trained with", low=0, high=1
    )
