"""The pathway generator G: a small ResNet that scores the experts of a hub for each input.

Equation 3 of the paper: a standard part G_p (the clean scores) and a random part G_n (the raw
noise scales); here two linear heads on one trunk. The paper says "a 9-layer ResNet"; the layers
below, the width, the strides and the initial values are our choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a residual connection (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PathwayGenerator(nn.Module):
    """Nine layers: a stem and four basic blocks, then two linear heads on the pooled features.

    Args:
        num_experts: M, the width of both heads.
        in_channels: of the input images.
        width: channels of the stem and the first block; later blocks have 2, 4 and 8 times as many.
        stride: side of the average pooling applied to the input first. The generator only has to
            tell inputs apart: at 224 pixels a stride of 4 makes it a small part of a step.
        noise_init: raw noise scale at the start; softplus(noise_init) is its standard deviation.

    Input: [N, in_channels, H, W] floats, images in [0, 1]. Output: clean [N, M], noise [N, M].
    Both heads start with zero weights, so that all experts start equally likely.
    """

    def __init__(
        self,
        num_experts: int,
        in_channels: int = 3,
        width: int = 16,
        stride: int = 1,
        noise_init: float = 0.0,
    ):
        super().__init__()
        for name, value in (("num_experts", num_experts), ("in_channels", in_channels),
                            ("width", width), ("stride", stride)):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        self.num_experts, self.in_channels = num_experts, in_channels
        self.width, self.stride = width, stride
        self.stem = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            BasicBlock(width, width, 1),
            BasicBlock(width, 2 * width, 2),
            BasicBlock(2 * width, 4 * width, 2),
            BasicBlock(4 * width, 8 * width, 2),
        )
        self.clean = nn.Linear(8 * width, num_experts)
        self.noise = nn.Linear(8 * width, num_experts)
        self._initialise(noise_init)

    def _initialise(self, noise_init: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        start_equal(self.clean, self.noise, noise_init)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.from_seen(self.seen(x))

    def seen(self, x: Tensor) -> Tensor:
        """What it looks at of images x: all that comes before its first weight."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x: the generator takes [N, {self.in_channels}, H, W], got {list(x.shape)}"
            )
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x

    def from_seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of images of which it has ``seen`` x."""
        features = self.features(x)
        return self.clean(features), self.noise(features)

    def features(self, x: Tensor) -> Tensor:
        """[N, F]: what both heads make the scores of, of images of which it has ``seen`` x."""
        x = F.relu(self.norm(self.stem(x)))
        return self.blocks(x).mean(dim=(2, 3))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, width={self.width}, stride={self.stride}"

    @staticmethod
    def flops(num_experts: int, width: int, stride: int, size: int, in_channels: int = 3) -> int:
        """FLOPs of one image of ``size`` pixels a side (a multiplication and an addition are two),
        in closed form: a choice among many widths and strides need not build any."""
        side, features = size // stride, width
        total = 9 * in_channels * width * side**2 + 2 * 9 * width**2 * side**2
        for _ in range(3):  # the blocks of stride 2: two convolutions and the shortcut
            side = (side + 1) // 2
            total += (9 * 2 + 9 * 4 + 2) * features**2 * side**2
            features *= 2
        return 2 * (total + 2 * features * num_experts)


def start_equal(clean: nn.Linear, noise: nn.Linear, noise_init: float) -> None:
    """Heads of zero weights, so that all experts start equally likely; the raw noise scale starts
    as ``noise_init``."""
    for head in (clean, noise):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    nn.init.constant_(noise.bias, noise_init)


@torch.no_grad()
def check_scores(clean: Tensor, noise: Tensor, num_samples: int, num_experts: int) -> None:
    """Raise ValueError where a generator's output is not two score matrices for this hub."""
    for name, scores in (("clean", clean), ("noise", noise)):
        if list(scores.shape) != [num_samples, num_experts]:
            raise ValueError(
                f"generator: expected {name} scores of shape [samples, experts] = "
                f"[{num_samples}, {num_experts}], got {list(scores.shape)}; give it one output per "
                "expert"
            )
