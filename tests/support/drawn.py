"""What the tests of figures share: names of experts, and where texts lie."""

from __future__ import annotations

import itertools

from hubpath_fast.measure import Measure

# Stand-ins for those of tasks: in one more is better, in the other less, without an upper end.
ACCURACY = Measure("accuracy", "max", (0.0, 1.0), scale=100, unit="%", decimals=1)
ERROR = Measure("error", "min", (0.0, None))
FIVE = [
    "upright/test_resnet",
    "inverted/test_efficientnet",
    "turned/test_byobnet",
    "edges/test_resnet",
    "checkerboard/test_nfnet",
]
TEN = [
    "resnet50.tv_in1k",
    "resnet50.tv2_in1k",
    "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "convnext_tiny.fb_in22k_ft_in1k_384",
    "efficientnet_b0.ra_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "mobilenetv3_large_100.ra_in1k",
    "deit_small_patch16_224.fb_in1k",
    "regnety_016.tv2_in1k",
    "maskrcnn_resnet50_fpn",
]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def assert_readable(place, artists, apart=None) -> None:
    """No text leaves its place, a figure or axes, and none lies on another, but for a pixel.

    apart: those that must not lie on each other; None: all.
    """
    for box in _boxes(artists):
        assert place.bbox.x0 - 1 <= box.x0 < box.x1 <= place.bbox.x1 + 1
        assert place.bbox.y0 - 1 <= box.y0 < box.y1 <= place.bbox.y1 + 1
    for a, b in itertools.combinations(_boxes(artists if apart is None else apart), 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 1 or height <= 1


def _boxes(artists) -> list:
    return [artist.get_window_extent() for artist in artists if artist.get_text().strip()]
