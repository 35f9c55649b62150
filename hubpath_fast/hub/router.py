"""How large the pathway generator of a hub is: a small share of what its experts cost.

Our choice; the paper says nine layers, and no more. Shapes: M experts, K active ones.
"""

from __future__ import annotations

from ..model import PathwayGenerator

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
