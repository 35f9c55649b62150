"""What is minimised: the settings of the losses, and of the mixing that makes targets soft."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.mixup import MODES
from ..fields import Settings, setting


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """Weights and smoothing of the losses, see ``Task.criterion``; mixed images, see
    ``data.Mixing``."""

    explore: float = setting(0.5, "lambda, weight of the exploration loss", low=0)
    label_smoothing: float = setting(
        0.0, "of the cross-entropy that is trained with", low=0, high=1
    )
    mixup: float = setting(
        0.0, "alpha of timm's Mixup on training batches, such as 0.2; 0: none", low=0, added=True
    )
    cutmix: float = setting(
        0.0, "alpha of timm's CutMix on training batches, such as 1; 0: none", low=0, added=True
    )
    mixup_prob: float = setting(
        1.0, "of mixing at all, where mixup or cutmix is on", low=0, high=1, added=True
    )
    mixup_switch_prob: float = setting(
        0.5, "of CutMix rather than Mixup, where both are on", low=0, high=1, added=True
    )
    mixup_mode: str = setting(
        "batch", "what shares a draw: the batch, a pair, or nothing", choices=MODES, added=True
    )

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed."""
        return self.mixup > 0 or self.cutmix > 0
