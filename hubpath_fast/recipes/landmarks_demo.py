"""``hubpath landmarks demo``: landmarks of handwritten digits, by experts that know their classes.

The demo of ``demo`` with another task: five soft landmarks a digit (see
``tasks.landmarks.digits``), heat maps in place of classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare.settings import PASSES, CompareSettings, make_settings
from ..runs.config import LANDMARKS
from ..tasks.landmarks.digits import LandmarkDigits
from .demo import DemoKind, run_demo

if TYPE_CHECKING:
    from .demo_report import Demo, Words

METHODS = (
    "mean-shape,single,best-single,best-single-in-hindsight,ensemble-top-k,ensemble,hub-pathway,"
    "oracle"
)
# One network a rendering, in the order of RENDERINGS. (At 64 pixels timm's test_nfnet, which knows
# the checkerboard in the other demo, takes 2.5 times as long as any of these.)
NETWORKS = ("test_resnet", "test_efficientnet", "test_byobnet", "test_resnet", "test_efficientnet")
# Of the bodies, for every method.
RATE = 3e-3
# An update trains each expert of a Hub-Pathway on K / M of the images, and heads of maps are new:
# by the same number of updates its experts would have seen 2.5 times fewer images than the others.
BUDGET = PASSES


def landmarks_demo_settings(quick: bool = False, device: str = "cpu") -> CompareSettings:
    """The demo as a comparison. quick: a few steps, whose figures say little."""
    hub, trainer = ",".join(NETWORKS), {"device": device}
    budget = {"budget": BUDGET}
    return make_settings(
        "digits", hub, None, (RATE,), quick, trainer=trainer, distill=budget, task=LANDMARKS
    )


def _off(result: Demo) -> str:
    k, total, measure = result.summary["k"], len(result.experts), result.measure
    names = "hub_pathway", "ensemble", "ensemble_top_k", "best_single", "mean_shape"
    hub, ensemble, equal, best, shape = (measure.text(result.summary[name]) for name in names)
    return (
        f"Hub-Pathway asks {k} of {total} experts about each image and is off by {hub} of a "
        f"digit's diagonal, the mean over {len(result.test)} test digits and their five landmarks. "
        f"The ensemble of the best {k}, at the same cost, is off by {equal}, that of all {total} "
        f"by {ensemble}, the best single expert by {best}, and the mean shape of the training "
        f"digits, the same for all, by {shape}."
    )


def _words() -> Words:
    from .demo_report import Words  # draws figures: takes a second to import

    return Words(
        "Hub-Pathway on landmarks of handwritten digits",
        _off,
        "which takes the best single expert for each digit",
        "the landmarks of the target digits",
        "Single experts are about as good in each rendering as the one that was pre-trained on it: "
        "for where strokes end, what an expert knew before matters little, and so does which one "
        "is asked.",
    )


LANDMARKS_DEMO = DemoKind(
    "hubpath landmarks demo", METHODS, landmarks_demo_settings, LandmarkDigits, _words
)


def landmarks_demo(
    out_dir: str | Path = "hubpath-landmarks-demo", *args: Any, **more: Any
) -> dict[str, Any]:
    """See ``run_demo``, whose arguments after ``kind`` it takes. Its figures are errors over a
    digit's diagonal, as shares."""
    return run_demo(LANDMARKS_DEMO, out_dir, *args, **more)
