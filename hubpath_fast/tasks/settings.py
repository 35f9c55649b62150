"""What is minimised: the settings of the losses, and of the mixing that makes targets soft."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.mixup import MODES
from ..fields import Settings, setting


@dataclass(frozen=True, kw_only=True)
class LossWeights(Settings):
    """Weights and smoothing of the losses, see ``Task.criterion``."""

    explore: float = setting(0.5, "lambda, weight of the exploration loss", low=0)
    router_supervision: float = setting(
        0.0,
        "weight of the router's supervision by what the active experts got right (ours, not the "
        "paper's; needs k of at least 2); 0: none",
        low=0,
        added=True,
    )
    router_temperature: float = setting(
        1.0,
        "of that supervision: the lower, the more the best of the active experts takes all",
        above=0,
        added=True,
    )
    label_smoothing: float = setting(
        0.0, "of the cross-entropy that is trained with", low=0, high=1
    )

    @property
    def supervision(self) -> dict[str, float]:
        """What ``Task.criterion`` is given of it: nothing where it is off, which tasks that know
        of none take, too."""
        if not self.router_supervision:
            return {}
        names = "router_supervision", "router_temperature"
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class LossSettings(LossWeights):
    """Those, and mixed images, see ``data.Mixing``."""

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
