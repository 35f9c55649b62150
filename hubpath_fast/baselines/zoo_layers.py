"""Zoo-Tuning's layers: the kernel of each image is mixed from the experts' kernels.

    K_n = sum_m a[n, m] * (T_m W_m)        y_n = x_n * K_n + sum_m a[n, m] * b_m

W_m, b_m are expert m's weight and bias, T_m a learnable matrix on the weight's output channels that
starts as the identity (the channel alignment), and a[n] the gate's coefficients for image n.

Shapes: N images, M experts, I input and O output channels, G groups, kh x kw taps of a kernel,
H x W positions of the output; B is N for coefficients of each image, and 1 for one set for all.

A convolution is linear in its kernel, so the kernels of an image can be mixed, or the outputs of M
convolutions; ``MixedConv2d`` takes what costs less: kernels for large maps, outputs for small ones.
On one CPU thread, 48 images of 32 x 32 and five of timm's test_resnet, a training step so took
83 ms (a single network: 33), with kernels alone 200 and with outputs alone 174. On a GPU the choice
has not been measured. A linear layer is a 1 x 1 convolution, whose channels come last.
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


def mix_linear(
    x: Tensor, kernels: Tensor, biases: Tensor | None, alignment: Tensor | None,
    coefficients: Tensor,
) -> Tensor:  # fmt: skip
    """Products with a mixed matrix for each sample, in the order that costs less.

    Args:
        x: [N, ..., I]. kernels: [M*O, I], expert by expert. biases: [M*O], mixed but not aligned,
            or None. alignment: [M, O, O] or None. coefficients: [B, M].

    Returns:
        [N, ..., O].
    """
    count, inputs = coefficients.shape[1], kernels.shape[1]
    rows = x.reshape(len(x), -1, inputs)
    shape, align = (len(kernels) // count, inputs), alignment is not None
    if outputs_are_cheaper(
        rows.shape[1], len(x), len(coefficients), shape, count, groups=1, align=align
    ):
        outputs = F.linear(rows, kernels).unflatten(2, (count, -1)) * coefficients[:, None, :, None]
        if align:  # after the product: one matrix [O, M*O] aligns and adds up
            y = F.linear(outputs.flatten(2), alignment.transpose(0, 1).flatten(1))
        else:
            y = outputs.sum(2)
    else:
        mixed = coefficients @ _aligned(kernels, alignment).reshape(count, -1)
        y = rows @ mixed.view(-1, *shape).transpose(1, 2)  # [B, I, O]
    if biases is not None:
        y = y + (coefficients @ biases.view(count, -1))[:, None]
    return y.view(*x.shape[:-1], -1)


class MixedLayer(nn.Module):
    """What layers mixed from M experts share: the gate, [N, I] -> coefficients [N, M].

    The gate sees the input's mean over all positions. As in the authors' code it has I // 4 + 1
    hidden channels. Our choice: it starts near coefficients of 1/M each, so that the first kernels
    are about the experts' mean (the authors' begins around 1/2).

    lite: in training the batch's mean of the coefficients holds for all of its images; their moving
    average, ``average`` [M], which takes no gradient, is what evaluation uses.
    """

    alignment: nn.Parameter | None

    def __init__(self, num_experts: int, lite: bool):
        super().__init__()
        self.lite, self.num_experts = lite, num_experts

    def add_gate(self, inputs: int, like: nn.Parameter) -> None:
        """Registers the gate on I channels, and what a lite one remembers."""
        hidden, count = inputs // 4 + 1, self.num_experts
        options = {"dtype": like.dtype, "device": like.device}
        # On the pooled input, [N, I], a 1 x 1 convolution is a linear layer.
        self.gate = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False, **options),
            nn.ReLU(),
            nn.Linear(hidden, count, **options),
        )
        nn.init.normal_(self.gate[2].weight, std=GATE_STD)
        nn.init.constant_(self.gate[2].bias, -math.log(count - 1))  # the sigmoid of it is 1/M
        average = torch.full((count,), 1 / count, **options) if self.lite else None
        self.register_buffer("average", average)

    def gated(self, pooled: Tensor) -> Tensor:
        """Pooled inputs [N, I] -> [N, M] between 0 and 1, or [1, M] for all images if lite."""
        if self.lite and not self.training:
            return self.average[None]
        coefficients = torch.sigmoid(self.gate(pooled))
        if not self.lite:
            return coefficients
        coefficients = coefficients.mean(dim=0, keepdim=True)
        self.average.lerp_(coefficients.detach()[0].to(self.average.dtype), MOMENTUM)
        return coefficients

    def router_parameters(self) -> list[nn.Parameter]:
        """The gate's and the alignment's: what is new, and no expert's."""
        alignment = [] if self.alignment is None else [self.alignment]
        return [*self.gate.parameters(), *alignment]


class MixedConv2d(MixedLayer):
    """M equal convolutions as one, mixed for each image by a gate: [N, I, ...] -> [N, O, H, W].

    Parameters: ``kernels`` [M*O, I/G, kh, kw], ``biases`` [M*O] (mixed by the coefficients, not
    aligned), ``alignment`` [M, O, O], and the ``gate``. As in the authors' code, 1 x 1 kernels have
    no alignment. lite: see ``MixedLayer``.

    Raises ValueError for a convolution whose weight is not simply a parameter to convolve with (a
    subclass with its own forward, weight normalisation), or that is not 2-dimensional.
    """

    def __init__(self, convolutions: Sequence[nn.Conv2d], lite: bool = False):
        first, count = convolutions[0], len(convolutions)
        super().__init__(count, lite)
        for convolution in convolutions:
            _check(convolution)
        channels, inputs = first.out_channels, first.in_channels
        self.shape = tuple(first.weight.shape)
        self.settings = {"stride": first.stride, "dilation": first.dilation, "groups": first.groups}
        self.padding = {"padding": first.padding, "padding_mode": first.padding_mode}
        self.edges = None  # what F.pad is given where a convolution cannot pad by itself
        if isinstance(first.padding, str) or first.padding_mode != "zeros":
            self.edges = tuple(first._reversed_padding_repeated_twice)
        self.kernels = joined([convolution.weight for convolution in convolutions])
        self.biases = None if first.bias is None else joined([layer.bias for layer in convolutions])
        needed = max(first.kernel_size) > 1
        self.alignment = identities(count, channels, first.weight) if needed else None
        self.add_gate(inputs, first.weight)

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
        return self.gated(x.mean(dim=(2, 3)))

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


class MixedLinear(MixedLayer):
    """M equal linear layers as one, mixed for each sample by a gate: [N, ..., I] -> [N, ..., O].

    Parameters as of ``MixedConv2d``: ``kernels`` [M*O, I], ``biases`` [M*O], ``alignment``
    [M, O, O] only if ``align``, and the ``gate``, which sees the mean over the dimensions between.

    ``kind`` is the type of layer that is mixed; a class for another one gives it and what the
    products are with, ``matrices``.

    Raises ValueError for a layer whose weight is not simply a parameter to multiply with.
    """

    kind: type[nn.Linear] = nn.Linear

    def __init__(self, layers: Sequence[nn.Linear], lite: bool = False, align: bool = False):
        first, count = layers[0], len(layers)
        super().__init__(count, lite)
        for layer in layers:
            plain = type(layer).forward is self.kind.forward and "weight" in layer._parameters
            if not plain:
                raise _unknown(layer, self.kind)
        self.in_features, self.out_features = first.in_features, first.out_features
        self.kernels = joined([layer.weight for layer in layers])
        self.biases = None if first.bias is None else joined([layer.bias for layer in layers])
        outputs = first.out_features
        self.alignment = identities(count, outputs, first.weight) if align else None
        self.add_gate(first.in_features, first.weight)

    def forward(self, x: Tensor) -> Tensor:
        kernels, biases = self.matrices()
        return mix_linear(x, kernels, biases, self.alignment, self.coefficients(x))

    def matrices(self) -> tuple[Tensor, Tensor | None]:
        """The kernels [M*O, I] and the biases [M*O]."""
        return self.kernels, self.biases

    def coefficients(self, x: Tensor) -> Tensor:
        """x [N, ..., I] -> [N, M] between 0 and 1, or [1, M] for all samples if lite."""
        return self.gated(mean_of_positions(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that a lite one is at evaluation."""
        count = self.num_experts
        layer = nn.Linear(
            self.in_features, self.out_features, bias=self.biases is not None,
            dtype=self.kernels.dtype, device=self.kernels.device,
        )  # fmt: skip
        aligned = _aligned(self.kernels, self.alignment).reshape(count, -1)
        layer.weight.copy_((self.average @ aligned).view(layer.weight.shape))
        if self.biases is not None:
            layer.bias.copy_(self.average @ self.biases.view(count, -1))
        return layer

    def extra_repr(self) -> str:
        sizes = f"{self.in_features} -> {self.out_features}"
        return f"{self.num_experts} experts, {sizes}, lite={self.lite}"


def mean_of_positions(x: Tensor) -> Tensor:
    """[N, ..., I] -> [N, I]."""
    return x if x.dim() == 2 else x.flatten(1, -2).mean(dim=1)


def identities(count: int, channels: int, like: nn.Parameter) -> nn.Parameter:
    """An alignment at its start, [M, O, O]."""
    eye = torch.eye(channels, dtype=like.dtype, device=like.device)
    return nn.Parameter(eye.repeat(count, 1, 1))


def _aligned(kernels: Tensor, alignment: Tensor | None) -> Tensor:
    """T_m W_m of all experts, [M*O, I/G, kh, kw]."""
    if alignment is None:
        return kernels
    return torch.bmm(alignment, kernels.reshape(*alignment.shape[:2], -1)).reshape(kernels.shape)


def joined(tensors: Sequence[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.cat([t.detach() for t in tensors]), tensors[0].requires_grad)


def _check(layer: nn.Module) -> None:
    kind = type(layer)
    plain = isinstance(layer, nn.Conv2d) and (
        kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    )
    if not plain or "weight" not in layer._parameters:
        raise _unknown(layer, nn.Conv2d)


def _unknown(layer: nn.Module, known: type[nn.Module]) -> ValueError:
    name = f"nn.{known.__name__}" if hasattr(nn, known.__name__) else known.__name__
    return ValueError(
        f"experts: Zoo-Tuning mixes the weights of plain {name} layers, and does not "
        f"know what a {type(layer).__name__} makes of its weight; take networks without such layers"
    )
