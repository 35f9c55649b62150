"""The settings of ``hubpath shelf fit``."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import setting
from ..model import AGGREGATORS
from ..tasks.settings import LossWeights
from ..training import TrainerConfig
from .model import FEATURES, IMAGE

ALL = "all"
NEW, FITTED = HEADS = ("new", "fitted")
DEFAULT_EXPERTS = 32


def read_experts(text: str) -> str:
    """A number of experts, or "all", in the form that is kept; ValueError for anything else."""
    found = str(text).strip().lower()
    if found == ALL or (found.isdecimal() and int(found) > 0):
        return found if found == ALL else str(int(found))
    raise ValueError(f"experts: expected a number of at least 1, or all, got {text!r}")


def read_router(text: str) -> str:
    """Raises ValueError for what is neither "image" nor "features:LABEL"."""
    kind, _, label = text.partition(":")
    if text != IMAGE and not (kind == FEATURES and label):
        raise ValueError(f"router: expected image or features:LABEL, got {text!r}")
    return text


# Chosen on validation images of the digits' shelf, as is that heads are new: fitted ones know the
# training images by heart, so that a router sees no difference between their experts there. Of
# heads a rate of 1e-2 was better still by half a point, on features of 320 numbers at most; the
# outputs move by a rate times the sum of the features, and other networks have thousands of them.
TRAINER = TrainerConfig(
    steps=400, batch_size=256, lr_expert=3e-3, lr_head=3e-3, lr_router=3e-3, eval_every=50,
    save_every=200,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ShelfFitSettings(LossWeights):
    """How a hub is routed on a shelf's features."""

    k: int = setting(2, "active experts of each image", low=1)
    experts: str | None = setting(
        None,
        "models to route among: a number, which are then chosen on validation images, or all; "
        f"None: {DEFAULT_EXPERTS}, or all where there are fewer",
        convert=read_experts,
    )
    router: str = setting(
        IMAGE,
        "what scores the experts: image, a small ResNet, or features:LABEL, linear heads on those "
        "of a model that then runs on every image and is no expert",
        convert=read_router,
    )
    heads: str = setting(
        NEW, "what the experts' heads start as: new, or fitted on the training images",
        choices=HEADS,
    )  # fmt: skip
    aggregator: str = setting(
        "auto",
        "what combines the experts' outputs: linear, sum (a weighted sum), mlp, or auto, which is "
        "sum from 64 experts on and linear below",
        choices=AGGREGATORS,
    )
    generator_width: int = setting(8, "channels of the router on the image", low=1)
    generator_stride: int | None = setting(
        None, "side of the router's first pooling; None: what leaves about 16 pixels a side", low=1
    )
    renormalize: bool | None = setting(
        None,
        "divide the K weights by their sum, which of many experts are small; None: if k is above 1",
    )
    trainer: TrainerConfig = setting(TRAINER, "of the training")

    @property
    def renormalizes(self) -> bool:
        return self.k > 1 if self.renormalize is None else self.renormalize

    def check(self) -> None:
        if self.renormalize and self.k == 1:
            raise ValueError(
                "renormalize: expected False with k=1, got True; the weight is then 1 whatever the "
                "router says, and it would learn nothing"
            )
        if self.router_supervision and self.k == 1:
            raise ValueError(
                f"router_supervision: expected 0 with k=1, got {self.router_supervision}; with one "
                "active expert a sample has nothing to compare: set it to 0 or take a larger k"
            )
