"""The generator of a hub: what it looks at, and how large it is.

Ours: the paper has a network of nine layers on the image, and says no more of it. Shapes: N images,
F features, M experts, K active ones.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from torch import Tensor, nn

from ..fields import there_are
from ..model import FeatureGenerator, PathwayGenerator, make_aggregator
from .build import build_experts
from .costs import expert_flops
from .errors import HubError
from .expert import Expert
from .outputs import run_once
from .source import on_meta

IMAGE, EXPERT, NETWORK = "image", "expert", "network"

ROUTER_SHARE = 0.05  # of the FLOPs of K mean experts, at most
# The generator only tells inputs apart: about this many pixels a side are enough for that.
GENERATOR_PIXELS, GENERATOR_WIDTH = 56, 16
WIDTHS = (4, 6, 8, 12, GENERATOR_WIDTH)
LEAST_PIXELS = 8  # its three halvings leave one pixel of them


def generator_size(
    num_experts: int, size: int, expert_flops: float | None, width: int | None, stride: int | None
) -> tuple[int, int]:
    """(width, stride) of the ``PathwayGenerator`` for images of ``size`` pixels a side.

    expert_flops: those of K mean experts for an image; None: not known. width, stride: as asked
    for; a width alone, or experts whose FLOPs are not known, have the stride that leaves about 56
    pixels a side.

    What is open is chosen within ``ROUTER_SHARE``. What the generator sees is held up by whichever
    of the two is scarcer, its pixels (of 56) or its channels (of 16), and a convolution's cost
    grows with the square of either: so the size is the one whose scarcer one is largest, and of
    those with as much the dearest. Where none is cheap enough, it is the smallest: 4 channels, and
    8 pixels a side or as many as the images have.
    """
    if width is not None or expert_flops is None:
        return width or GENERATOR_WIDTH, stride or max(1, size // GENERATOR_PIXELS)
    first = max(1, round(size / GENERATOR_PIXELS))
    strides = range(first, max(first, size // LEAST_PIXELS) + 1) if stride is None else (stride,)
    costs = {
        (w, s): PathwayGenerator.flops(num_experts, w, s, size) for s in strides for w in WIDTHS
    }
    within = [made for made, cost in costs.items() if cost <= ROUTER_SHARE * expert_flops]

    def sees(made: tuple[int, int]) -> tuple[float, int]:
        pixels = min(1, size // made[1] / GENERATOR_PIXELS)
        return min(made[0] / GENERATOR_WIDTH, pixels), costs[made]

    return max(within, key=sees, default=(WIDTHS[0], strides[-1]))


def default_router(
    num_outputs: int, size: int, k: int, flops: Sequence[int | None]
) -> tuple[nn.Module, nn.Module]:
    """The shapes of the default (generator, aggregator), on torch's meta device. flops: of each
    expert, for an image of ``size`` pixels a side; None: not known."""
    count = len(flops)
    active = None if None in flops else k * sum(flops) / count
    width, stride = generator_size(count, size, active, None, None)
    return (
        on_meta(lambda: PathwayGenerator(count, width=width, stride=stride)),
        on_meta(lambda: make_aggregator("auto", count, num_outputs)),
    )


def check_router(router: str) -> None:
    """Raises ValueError unless it is "image", "expert", "expert:NAME" or "network:NAME"."""
    kind, colon, name = router.partition(":")
    if (kind == NETWORK and name) or (kind == EXPERT and bool(colon) == bool(name)):
        return
    if router != IMAGE:
        close = difflib.get_close_matches(kind, (IMAGE, EXPERT, NETWORK), n=1)
        hint = f"; did you mean {close[0]}?" if close and close[0] != kind else ""
        raise ValueError(
            f"router: expected image, expert, expert:NAME or network:NAME, got {router!r}{hint}"
        )


def looks_at_expert(router: str) -> bool:
    """Whether such a router runs an expert on every image."""
    return router.partition(":")[0] == EXPERT


def make_generator(
    router: str,
    experts: Sequence[Expert],
    num_outputs: int,
    size: int,
    k: int,
    pretrained: bool,
    width: int | None,
    stride: int | None,
) -> nn.Module:
    """The generator that ``router`` names, for images of ``size`` pixels a side; see
    ``create_model``.

    Raises:
        ValueError: a router of another form.
        HubError: no such expert or network, or one without features.
    """
    check_router(router)
    kind, _, name = router.partition(":")
    flops = []
    if (kind == EXPERT and not name) or (kind == IMAGE and width is None):
        flops = [expert_flops(expert, num_outputs, size) for expert in experts]
    if kind == IMAGE:
        known = flops and None not in flops and any(flops)
        active = k * sum(flops) / len(flops) if known else None
        width, stride = generator_size(len(experts), size, active, width, stride)
        return PathwayGenerator(len(experts), width=width, stride=stride)
    if kind == NETWORK:
        [source] = _network(name, pretrained, size)
    else:
        source = experts[_find(name, experts) if name else _cheapest(flops)]
    source = detached(source)
    features = _num_features(source, router, experts, size)
    return FeatureGenerator(
        source, len(experts), features, source.mean, source.std, own=kind == NETWORK
    )


def detached(source: Expert) -> Expert:
    """As a generator keeps it: what its source knows of a network can be no part of a model, which
    is copied and pickled."""
    return dataclasses.replace(source, model=None, task=None, spec=None)


def _network(name: str, pretrained: bool, size: int) -> list[Expert]:
    """A network of the router's own; its head, which is not used, has one output."""
    try:
        return build_experts([name], 1, pretrained, size)
    except HubError as error:
        raise HubError(*(f"router: {problem}" for problem in error.problems)) from None


def _cheapest(flops: Sequence[int | None]) -> int:
    """The first of those with the fewest FLOPs; where none can be counted, the first."""
    return min(range(len(flops)), key=lambda i: float("inf") if flops[i] is None else flops[i])


def _find(name: str, experts: Sequence[Expert]) -> int:
    """The number of the expert that is called so, in full or in short, or has that number."""
    if name.isdecimal():
        if int(name) < len(experts):
            return int(name)
        raise HubError(f"router: expected an expert, 0..{len(experts) - 1}, got expert:{name}")
    spellings = [_spellings(expert) for expert in experts]
    found = [i for i, names in enumerate(spellings) if name in names]
    labels = [expert.label or expert.name for expert in experts]
    if not found:
        known = {spelling: labels[i] for i, names in enumerate(spellings) for spelling in names}
        raise HubError(
            f"router: no expert of the hub is called {name!r}; {there_are(labels, name, known)}"
        )
    if len(found) > 1:
        numbers = ", ".join(map(str, found))
        raise HubError(
            f"router: {name!r} are the experts {numbers} of the hub; give one's number, such as "
            f"expert:{found[0]}"
        )
    return found[0]


def _spellings(expert: Expert) -> set[str]:
    """timm/resnet50.a1_in1k is also resnet50.a1_in1k and resnet50."""
    bare = expert.name.rpartition("/")[2]
    return {expert.name, bare, bare.partition(".")[0], expert.label or expert.name}


def _num_features(source: Expert, router: str, experts: Sequence[Expert], size: int) -> int:
    """F of a network's pooled features, found on one grey image before anything is trained."""
    try:
        features, _ = run_once(_Pooled(source), 1, size)
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(found, list) or len(found) != 2 or found[0] != 1:
            raise ValueError(f"they are {found}, and the router needs [n, F]")
    except Exception as error:  # each architecture has its own way to refuse
        others = [expert.label or expert.name for expert in experts if expert.name != source.name]
        instead = f"another expert ({', '.join(others)}), " if others else ""
        reason = str(error) or type(error).__name__
        if isinstance(error, HubError):  # of Expert.features
            reason = "its head is not its last layer, and it lacks timm's forward_features"
        raise HubError(
            f"router: {router} asks {source.name} for features, and it has none ({reason}); "
            f"take {instead}network:NAME or image"
        ) from error
    return found[1]


class _Pooled(nn.Module):
    """A network's pooled features as a module, whose shapes can be asked for."""

    def __init__(self, source: Expert):
        super().__init__()
        self.source, self.module = source, source.module

    def forward(self, x: Tensor) -> Tensor:
        return self.source.pooled(x)
