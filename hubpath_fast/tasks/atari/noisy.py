"""Linear layers with factorised Gaussian noise on their weights (Fortunato et al., "Noisy Networks
for Exploration", ICLR 2018), with which Rainbow explores.

    W = mu_W + sigma_W * outer(f(eps_out), f(eps_in))        b = mu_b + sigma_b * f(eps_out)
    f(x) = sign(x) sqrt(|x|),     eps ~ N(0, 1)

Start: mu ~ U(-1/sqrt(in), 1/sqrt(in)), sigma_W = std / sqrt(in), sigma_b = std / sqrt(out). The
bias's scale by ``out`` is that of Kaixhin's code, which the protocol follows; others divide by
sqrt(in).

Noise is drawn when ``draw_noise`` is called and at no other time (but once on construction), so
that several forward passes can share a draw: the one that acts and those that learn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NoisyLinear(nn.Module):
    """[..., in_features] -> [..., out_features], noisy in training mode and plain in eval mode.

    Parameters: ``weight_mu``, ``weight_sigma`` [out, in], ``bias_mu``, ``bias_sigma`` [out].
    Buffers: ``noise_in`` [in] and ``noise_out`` [out], which hold f(eps). They are not in the state
    dict, since each step draws anew; setting them writes in place, so that a captured CUDA graph
    reads what was drawn last.

    The noisy weight is formed once for the forward passes of a step, which share a draw: it is kept
    as long as noise and parameters are the same, up to the first pass with gradients. An update
    follows that one, and an optimizer may write into memory that the parameters share, which their
    versions do not tell: nothing is kept then until new noise is set.

    Args:
        std: of the noise at the start, see above; 0.1 in Data-Efficient Rainbow.

    Raises:
        ValueError: sizes that are no positive integers, or a std that is negative or not finite.
    """

    row_wise = True  # see ``executors.graphs``

    def __init__(
        self, in_features: int, out_features: int, std: float = 0.1, device=None, dtype=None
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 <= std < math.inf:
            raise ValueError(f"std: expected a finite number of at least 0, got {std!r}")
        like = {"device": device, "dtype": dtype}
        super().__init__()
        self.in_features, self.out_features, self.std = in_features, out_features, float(std)
        for name, size in (("noise_in", in_features), ("noise_out", out_features)):
            self.register_buffer(name, scale_noise(torch.randn(size, **like)), persistent=False)
        self.weight_mu = nn.Parameter(torch.empty(out_features, in_features, **like))
        self.weight_sigma = nn.Parameter(torch.empty(out_features, in_features, **like))
        self.bias_mu = nn.Parameter(torch.empty(out_features, **like))
        self.bias_sigma = nn.Parameter(torch.empty(out_features, **like))
        self._kept, self._learning = None, False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts the parameters over, from torch's generator."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight_mu, -bound, bound)
        nn.init.uniform_(self.bias_mu, -bound, bound)
        nn.init.constant_(self.weight_sigma, self.std / math.sqrt(self.in_features))
        nn.init.constant_(self.bias_sigma, self.std / math.sqrt(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight_mu, self.bias_mu)
        return F.linear(x, *self.noisy_parameters())

    def noisy_parameters(self) -> tuple[Tensor, Tensor]:
        """The weight [out, in] and bias [out] under the present noise."""
        learning = torch.is_grad_enabled()
        weight = self._noisy_weight(learning)
        if learning:
            weight = _NoisyWeight.apply(
                self.weight_mu, self.weight_sigma, self.row_noise(), self.noise_in, weight
            )
        return weight, self.bias_mu + self.bias_sigma * self.row_noise()

    def row_noise(self) -> Tensor:
        """The noise of each row of the weight."""
        return self.noise_out

    @torch.no_grad()
    def _noisy_weight(self, learning: bool) -> Tensor:
        """The weight, without its gradient: what is kept, or a new one."""
        sources = (self.weight_mu, self.weight_sigma, self.noise_out, self.noise_in)
        state = [(tensor, tensor._version) for tensor in sources]
        if self._kept is not None and _same(self._kept[0], state):
            weight = self._kept[1]
        else:
            self._kept = None
            # Faster than addcmul, whose loop is slow on a CPU.
            weight = torch.outer(self.row_noise(), self.noise_in)
            weight.mul_(self.weight_sigma).add_(self.weight_mu)
        self._learning |= learning
        # Not on a GPU: a replayed graph changes tensors without a new version.
        keep = not self._learning and weight.device.type == "cpu"
        self._kept = (state, weight) if keep else None
        return weight

    def set_noise(self, eps_in: Tensor, eps_out: Tensor) -> None:
        """Takes raw normals, [in_features] and [out_features], of any float dtype and device."""
        for name, eps, size in (
            ("eps_in", eps_in, self.in_features),
            ("eps_out", eps_out, self.out_features),
        ):
            if not isinstance(eps, Tensor) or list(eps.shape) != [size]:
                found = list(eps.shape) if isinstance(eps, Tensor) else type(eps).__name__
                raise ValueError(f"{name}: expected raw normals [{size}], got {found}")
        with torch.no_grad():
            self.set_scaled_noise(scale_noise(eps_in), scale_noise(eps_out))

    def set_scaled_noise(self, noise_in: Tensor, noise_out: Tensor) -> None:
        """Takes f(eps_in) and f(eps_out)."""
        self.noise_in.copy_(noise_in)
        self.noise_out.copy_(noise_out)
        self._kept, self._learning = None, False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}  # what is kept belongs to this layer, not a copy

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, std={self.std}"


class _NoisyWeight(torch.autograd.Function):
    """A weight that is formed already, with the gradients of the formula."""

    @staticmethod
    def forward(ctx: Any, mu, sigma, noise_out, noise_in, weight) -> Tensor:
        ctx.save_for_backward(noise_out, noise_in)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        to_sigma = None
        if ctx.needs_input_grad[1]:
            to_sigma = torch.outer(*ctx.saved_tensors) * gradient
        return gradient, to_sigma, None, None, None


def scale_noise(eps: Tensor) -> Tensor:
    """f(x) = sign(x) sqrt(|x|) of each element."""
    return eps.abs().sqrt_().copysign_(eps)


def _same(a: list[tuple[Tensor, int]], b: list[tuple[Tensor, int]]) -> bool:
    return all(x is y and old == new for (x, old), (y, new) in zip(a, b, strict=True))


@torch.no_grad()
def draw_noise(module: nn.Module, generator: torch.Generator) -> None:
    """New noise for every noisy layer in a module, in the order of ``module.modules()``.

    One call of ``torch.randn`` in float32 on the CPU gives all of it, for each layer first eps_in,
    then eps_out, whatever the device and dtype of the layers, so that a seed means the same noise
    everywhere. A module without noisy layers draws nothing.

    Raises:
        ValueError: a generator that is not on the CPU.
    """
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        found = getattr(generator, "device", type(generator).__name__)
        raise ValueError(f"generator: expected a torch.Generator on the CPU, got one on {found}")
    layers = noisy_layers(module)
    if layers:
        drawn = scaled_draw(layers, generator)
        set_drawn(layers, drawn.to(layers[0].noise_in.device))  # one copy for all layers


def noisy_layers(module: nn.Module) -> list[NoisyLinear]:
    return [layer for layer in module.modules() if isinstance(layer, NoisyLinear)]


def scaled_draw(layers: list[NoisyLinear], generator: torch.Generator) -> Tensor:
    """f of new normals for all of these layers, one after another, on the CPU."""
    return scale_noise(torch.randn(sum(_sizes(layers)), generator=generator))


def set_drawn(layers: list[NoisyLinear], drawn: Tensor) -> None:
    """Gives each layer its part of what ``scaled_draw`` gave, in place."""
    parts = iter(drawn.split(_sizes(layers)))
    for layer in layers:
        layer.set_scaled_noise(next(parts), next(parts))


def _sizes(layers: list[NoisyLinear]) -> list[int]:
    return [size for layer in layers for size in (layer.in_features, layer.out_features)]
