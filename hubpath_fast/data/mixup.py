"""timm's Mixup and CutMix on a whole batch, stateless: what they draw hangs on (seed, step) alone.

Shapes: B images a batch, C classes, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .._checks import check_share, is_finite_number
from .order import Places, mix

MODES = ("batch", "pair", "elem")


class Mixing:
    """Images uint8 [B, 3, S, S] and classes int64 [B] of a step -> mixed images float32
    [B, 3, S, S] in [0, 1] and class probabilities float32 [B, C].

    ``mixing(images, targets, step)`` is a function of these and the seed. The first image is mixed
    with the last, the second with the last but one, and so on, so B must be even. The mixing is
    ``timm.data.Mixup``'s, with its defaults; smoothing of the labels is left to the loss, which
    smooths probabilities alike.

    With ``places``, where the images stand in the batch, they get what they get in the whole of it;
    each must come with its partner.

    Args:
        num_classes: C.
        mixup: alpha of the share's Beta(alpha, alpha) distribution in mixup; 0: no mixup.
        cutmix: the same of CutMix's share of the area; 0: no CutMix.
        prob: of mixing a batch (an image or a pair, as mode says) at all.
        switch_prob: of CutMix rather than mixup, where there are both.
        mode: one draw for each "batch", "pair" or image ("elem").
        seed: any integer.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        seed: int = 0,
    ):
        from timm.data import Mixup

        finite = is_finite_number(mixup) and is_finite_number(cutmix)
        if not (finite and mixup >= 0 and cutmix >= 0 and mixup + cutmix > 0):
            raise ValueError(
                "mixup, cutmix: expected numbers of at least 0, one of them above, got "
                f"{mixup!r} and {cutmix!r}"
            )
        check_share("prob", prob)
        check_share("switch_prob", switch_prob)
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.num_classes, self.seed = num_classes, seed
        self._mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=0.0,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, targets: Tensor, step: int, places: Places | None = None
    ) -> tuple[Tensor, Tensor]:
        check_even(len(images) if places is None else places.size)
        if targets.dim() != 1 or targets.is_floating_point():
            raise ValueError(
                f"targets: mixup and cutmix mix classes int64 [B], got {targets.dtype} "
                f"{list(targets.shape)}"
            )
        # The very numbers that a model makes of bytes; a copy, which is then mixed in place.
        images = images.float() / 255 if images.dtype == torch.uint8 else images.clone()
        with _seeded(mix(self.seed, "mixup", step)):
            # In batches of one draw, what is at hand is mixed as the whole is: partners mirror each
            # other in it, too.
            if places is None or self._mix.mode == "batch":
                return self._mix(images, targets)
            # timm draws image by image, so it is given the whole batch, with nothing in the places
            # of others.
            at = places.held.to(images.device)
            whole = images.new_zeros(places.size, *images.shape[1:]).index_copy_(0, at, images)
            classes = targets.new_zeros(places.size).index_copy_(0, at, targets)
            mixed, probabilities = self._mix(whole, classes)
            return mixed[at], probabilities[at]


def check_even(batch_size: int) -> None:
    """Raises ValueError for a batch that cannot be mixed."""
    if batch_size % 2:
        raise ValueError(
            "batch_size: expected an even number with mixup or cutmix, which mix the first image "
            f"with the last and so on, got {batch_size}; take {batch_size + 1} or "
            f"{batch_size - 1 or 2}"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """timm draws from numpy's own generator, which a run that is resumed must find as it was."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
