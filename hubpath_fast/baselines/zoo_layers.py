"""Zoo-Tuning's convolution: the kernel of each image is mixed from the experts' kernels.

    K_n = sum_m a[n, m] * (T_m W_m)        y_n = x_n * K_n + sum_m a[n, m] * b_m

W_m, b_m are expert m's weight and bias, T_m a learnable matrix on the weight's output channels that
starts as the identity (the channel alignment), and a[n] the gate's coefficients for image n.

Shapes: N images, M experts, I input and O output channels, G groups, kh x kw taps of a kernel,
H x W positions of the output; B is N for coefficients of each image, and 1 for one set for all.

A convolution is linear in its kernel, so the kernels of an image can be mixed, or the outputs of M
convolutions; ``MixedConv2d`` takes what costs less: kernels for large maps, outputs for small ones.
On one CPU thread, 48 images of 32 x 32 and five of timm's test_resnet, a training step so took
83 ms (a single network: 33), with kernels alone 200 and with outputs alone 174. On a GPU the choice
has not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What it costs to write and read a mixed kernel's element, in multiplications of a convolution:
# reckoned from single layers on one thread of a CPU, where it lay between 3 and 12.
KERNEL_TRAFFIC = 8

MOMENTUM = 0.1  # of the moving average of a lite gate, as in the authors' code
GATE_STD = 0.01  # of the gate's last weights: the first coefficients are within some 0.01 of 1/M


def mix_kernels(
    x: Tensor, kernels: Tensor, alignment: Tensor | None, coefficients: Tensor, *,
    stride=1, padding=0, dilation=1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """The images' kernels are mixed; then one convolution, the images folded into its groups.

    Args:
        x: [N, I, ...]. kernels: [M*O, I/G, kh, kw], expert by expert. alignment: [M, O, O] or None.
            coefficients: [B, M].
        stride, padding, dilation, groups: as of ``F.conv2d``; padding by numbers.

    Returns:
        [N, O, H, W], without a bias.
    """
    count = coefficients.shape[1]
    kernels = _aligned(kernels, alignment)
    mixed = coefficients @ kernels.reshape(count, -1)
    mixed = mixed.reshape(-1, *kernels.shape[1:])  # [B*O, I/G, kh, kw]
    if len(coefficients) == 1:
        return F.conv2d(x, mixed, None, stride, padding, dilation, groups)
    folded = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(folded, mixed, None, stride, padding, dilation, groups * len(x))
    return y.reshape(len(x), -1, *y.shape[2:])


def mix_outputs(
    x: Tensor, kernels: Tensor, alignment: Tensor | None, coefficients: Tensor, *,
    stride=1, padding=0, dilation=1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """The same as ``mix_kernels``, from one convolution with all experts' kernels.

    Without groups the alignment waits for the outputs too, as a 1 x 1 convolution of all experts'
    outputs, whose cost does not depend on the kernel's size.
    """
    count = coefficients.shape[1]
    align_after = groups == 1 and alignment is not None
    if not align_after:
        kernels = _aligned(kernels, alignment)
    # F.conv2d wants the output channels by group; here they come by expert.
    by_group = kernels.unflatten(0, (count, groups, -1)).transpose(0, 1).flatten(0, 2)
    y = F.conv2d(x, by_group, None, stride, padding, dilation, groups)
    outputs = y.unflatten(1, (groups, count, -1)) * coefficients[:, None, :, None, None, None]
    if align_after:
        matrix = alignment.transpose(0, 1).flatten(1)  # [O, M*O]
        return F.conv2d(outputs.flatten(1, 3), matrix[:, :, None, None])
    return outputs.sum(2).flatten(1, 2)


def outputs_are_cheaper(
    positions: int,
    batch: int,
    sets: int,
    shape: Sequence[int],
    count: int,
    groups: int,
    align: bool,
) -> bool:
    """Whether ``mix_outputs`` costs less than ``mix_kernels``.

    positions: H*W. batch: N. sets: B. shape: of one expert's weight, (O, I/G, kh, kw). count: M.
    Multiplications are counted for each element of that weight: so many by convolutions, M*O by the
    alignment of weights, B*M by the mixture of kernels, which costs memory traffic more than that.
    """
    channels, size = shape[0], math.prod(shape[1:])
    pixels = batch * positions
    align_weights = count * channels if align else 0
    by_kernels = align_weights + KERNEL_TRAFFIC * sets * count + pixels
    if groups == 1:
        by_outputs = pixels * count * (1 + (channels / size if align else 0))
    else:
        by_outputs = align_weights + pixels * count
    return by_outputs < by_kernels


class MixedConv2d(nn.Module):
    """M equal convolutions as one, mixed for each image by a gate: [N, I, ...] -> [N, O, H, W].

    Parameters: ``kernels`` [M*O, I/G, kh, kw], ``biases`` [M*O] (mixed by the coefficients, not
    aligned), ``alignment`` [M, O, O], and the ``gate``. As in the authors' code, 1 x 1 kernels have
    no alignment, and the gate has I // 4 + 1 hidden channels. Our choice: the gate starts near
    coefficients of 1/M each, so that the first kernels are about the experts' mean (the authors'
    begins around 1/2).

    lite: in training the batch's mean of the coefficients holds for all of its images; their moving
    average, ``average`` [M], which takes no gradient, is what evaluation uses.

    Raises ValueError for a convolution whose weight is not simply a parameter to convolve with (a
    subclass with its own forward, weight normalisation), or that is not 2-dimensional.
    """

    def __init__(self, convolutions: Sequence[nn.Conv2d], lite: bool = False):
        super().__init__()
        first, count = convolutions[0], len(convolutions)
        for convolution in convolutions:
            _check(convolution)
        channels, inputs = first.out_channels, first.in_channels
        self.lite, self.num_experts = lite, count
        self.shape = tuple(first.weight.shape)
        self.settings = {"stride": first.stride, "dilation": first.dilation, "groups": first.groups}
        self.padding = {"padding": first.padding, "padding_mode": first.padding_mode}
        self.edges = None  # what F.pad is given where a convolution cannot pad by itself
        if isinstance(first.padding, str) or first.padding_mode != "zeros":
            self.edges = tuple(first._reversed_padding_repeated_twice)
        self.kernels = _joined([convolution.weight for convolution in convolutions])
        self.biases = (
            None if first.bias is None else _joined([layer.bias for layer in convolutions])
        )
        like = {"dtype": first.weight.dtype, "device": first.weight.device}
        eye = torch.eye(channels, **like).repeat(count, 1, 1)
        self.alignment = nn.Parameter(eye) if max(first.kernel_size) > 1 else None
        hidden = inputs // 4 + 1
        # On the pooled input, [N, I], a 1 x 1 convolution is a linear layer.
        self.gate = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False, **like),
            nn.ReLU(),
            nn.Linear(hidden, count, **like),
        )
        nn.init.normal_(self.gate[2].weight, std=GATE_STD)
        nn.init.constant_(self.gate[2].bias, -math.log(count - 1))  # the sigmoid of it is 1/M
        self.register_buffer("average", torch.full((count,), 1 / count, **like) if lite else None)

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.coefficients(x)
        padding = self.padding["padding"]
        if self.edges is not None:
            mode = self.padding["padding_mode"]
            x = F.pad(x, self.edges, "constant" if mode == "zeros" else mode)
            padding = (0, 0)
        mix = mix_outputs if self._by_outputs(x, padding, len(coefficients)) else mix_kernels
        options = {**self.settings, "padding": padding}
        y = mix(x, self.kernels, self.alignment, coefficients, **options)
        if self.biases is None:
            return y
        return y + (coefficients @ self.biases.view(self.num_experts, -1))[:, :, None, None]

    def coefficients(self, x: Tensor) -> Tensor:
        """x [N, I, ...] -> [N, M] between 0 and 1, or [1, M] for all images if lite."""
        if self.lite and not self.training:
            return self.average[None]
        coefficients = torch.sigmoid(self.gate(x.mean(dim=(2, 3))))
        if not self.lite:
            return coefficients
        coefficients = coefficients.mean(dim=0, keepdim=True)
        self.average.lerp_(coefficients.detach()[0].to(self.average.dtype), MOMENTUM)
        return coefficients

    def router_parameters(self) -> list[nn.Parameter]:
        """The gate's and the alignment's: what is new, and no expert's."""
        alignment = [] if self.alignment is None else [self.alignment]
        return [*self.gate.parameters(), *alignment]

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The plain convolution that a lite layer is at evaluation."""
        count, (channels, inputs, *taps) = self.num_experts, self.shape
        layer = nn.Conv2d(
            inputs * self.settings["groups"], channels, taps, **self.settings, **self.padding,
            bias=self.biases is not None, dtype=self.kernels.dtype, device=self.kernels.device,
        )  # fmt: skip
        aligned = _aligned(self.kernels, self.alignment).reshape(count, -1)
        layer.weight.copy_((self.average @ aligned).view(self.shape))
        if self.biases is not None:
            layer.bias.copy_(self.average @ self.biases.view(count, -1))
        return layer

    def _by_outputs(self, x: Tensor, padding: Sequence[int], sets: int) -> bool:
        sides = [
            (side + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for side, pad, dilation, taps, stride in zip(
                x.shape[2:], padding, self.settings["dilation"], self.shape[2:],
                self.settings["stride"], strict=True,
            )
        ]  # fmt: skip
        return outputs_are_cheaper(
            math.prod(sides), len(x), sets, self.shape, self.num_experts, self.settings["groups"],
            self.alignment is not None,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {list(self.shape)}, {self.settings}, lite={self.lite}"


def _aligned(kernels: Tensor, alignment: Tensor | None) -> Tensor:
    """T_m W_m of all experts, [M*O, I/G, kh, kw]."""
    if alignment is None:
        return kernels
    return torch.bmm(alignment, kernels.reshape(*alignment.shape[:2], -1)).reshape(kernels.shape)


def _joined(tensors: Sequence[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.cat([t.detach() for t in tensors]), tensors[0].requires_grad)


def _check(layer: nn.Module) -> None:
    kind = type(layer)
    plain = isinstance(layer, nn.Conv2d) and (
        kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    )
    if not plain or "weight" not in layer._parameters:
        raise ValueError(
            f"experts: Zoo-Tuning mixes the weights of plain nn.Conv2d layers, and does not know "
            f"what a {kind.__name__} makes of its weight; take networks without such layers"
        )
