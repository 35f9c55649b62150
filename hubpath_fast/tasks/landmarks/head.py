"""The head that turns a network's last map into heat maps.

Deconvolutions 4 x 4 of stride 2, each with BatchNorm and ReLU, from the map's stride to 4, and a
1 x 1 convolution to the outputs: Xiao et al., "Simple Baselines for Human Pose Estimation", ECCV
2018. With one map an output, a landmark's map is a quarter of the image's side.

Letters: n images, F channels of the map, h x w cells of it, L outputs, S pixels a side.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...hub import HubError
from ...hub.dense import DenseNetwork

OUTPUT_STRIDE = 4  # pixels a side of an output's cell
WEIGHT_STD = 0.001
WIDTH = 256


class HeatmapHead(nn.Module):
    """[n, F, h, w] of a map -> [n, L, S/4, S/4], where h = w = S / stride.

    log2(stride / 4) deconvolutions (4 x 4, stride 2, padding 1, no bias) with BatchNorm and ReLU,
    then a 1 x 1 convolution with bias. All weights are drawn from N(0, 0.001); BatchNorm starts as
    the identity, the bias at 0. So outputs start near 0, as nearly all of a target is.

    Args:
        in_channels: F. num_outputs: L. width: channels of the deconvolutions.
        stride: pixels a side of a cell of the map; a power of two, of at least 4.

    Raises:
        HubError: another stride. ValueError: a number below 1.
    """

    row_wise = True  # see ``executors.graphs``

    def __init__(self, in_channels: int, num_outputs: int, stride: int, width: int = WIDTH):
        super().__init__()
        given = {"in_channels": in_channels, "num_outputs": num_outputs, "width": width}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value}")
        if stride < OUTPUT_STRIDE or stride & (stride - 1):
            raise HubError(
                f"stride: expected a map of 4, 8, 16, 32 or 64 pixels a cell, got {stride}: heat "
                f"maps have {OUTPUT_STRIDE} pixels a cell, and each deconvolution doubles a side"
            )
        channels, layers = in_channels, []
        while stride > OUTPUT_STRIDE:
            layers += [
                nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels, stride = width, stride // 2
        self.deconvolutions = nn.Sequential(*layers)
        self.final = nn.Conv2d(channels, num_outputs, 1)
        nn.init.zeros_(self.final.bias)
        for layer in self.modules():
            if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d)):
                nn.init.normal_(layer.weight, std=WEIGHT_STD)

    def forward(self, x: Tensor) -> Tensor:
        return self.final(self.deconvolutions(x))


def attach_heatmap_head(network: nn.Module, num_outputs: int, width: int = WIDTH) -> DenseNetwork:
    """A network of timm or torchvision with a ``HeatmapHead`` in place of its classifier.

    Its outputs are [n, L, S/4, S/4] of normalised images [n, 3, S, S], S a multiple of the stride.

    Args:
        network: with its weights; changed in place, and a part of what is returned.
        num_outputs: L. width: of the head.

    Raises:
        HubError: a network that has no map (see ``DenseNetwork``), or one of less than 4 pixels a
            cell.
    """
    return DenseNetwork(
        network, lambda channels, stride: HeatmapHead(channels, num_outputs, stride, width)
    )
