"""Inputs, truth and bounds shared by the tests of ``masked_batch_norm``.

The truth is torch's own BatchNorm on exactly the valid rows, in float64. What lies in the padded
rows of x, of the residual and of the incoming gradient is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from hubpath_fast import functional as HF
from hubpath_fast import kernels
from support.output_cases import ROUNDING, assert_within

BATCHES = 3  # that were seen before
U = ROUNDING[torch.float32]
# Terms of a sum that are added one behind the other, in float32: runs, then pairs of them.
CHAIN = 64
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu,
               "hardswish": F.hardswish}  # fmt: skip
# Of the derivative of each: where it jumps by how much, and how steep it is in between.
_JUMPS = {None: {}, "relu": {0.0: 1.0}, "relu6": {0.0: 1.0, 6.0: 1.0}, "silu": {},
          "hardswish": {-3.0: 0.5, 3.0: 0.5}}  # fmt: skip
_STEEPEST = {None: 0.0, "relu": 0.0, "relu6": 0.0, "silu": 0.5, "hardswish": 1 / 3}


@dataclass(frozen=True)
class Case:
    why: str
    n: int = 3
    capacity: int = 5
    c: int = 4
    trailing: tuple[int, ...] = (3, 5)
    layout: str = "contiguous"  # "last", "permuted" (W before H), "strided" (every other channel)
    weight: bool = True
    bias: bool = True
    activation: str | None = None
    residual: bool = False
    running: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    mean: float = 0.0  # of x, whose standard deviation is about 1


@dataclass
class Inputs:
    x: Tensor
    residual: Tensor | None
    d_y: Tensor
    count: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def copy(self) -> Inputs:
        """With leaves to differentiate in, and statistics of its own to move."""
        found = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None and field.name.startswith(("running", "num")):
                tensor = tensor.clone()
            elif tensor is not None and field.name in LEAVES:
                tensor = tensor.detach().requires_grad_()
            found[field.name] = tensor
        return Inputs(**found)


LEAVES = ("x", "weight", "bias", "residual")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, math.nan)], dim=2).flatten(1, 2)[:, ::2]
    assert layout == "contiguous"
    return x


def make(
    case: Case, dtype: torch.dtype, device="cpu", kept: torch.dtype | None = None, seed: int = 0
) -> Inputs:
    """kept: the dtype of parameters and statistics; None: float64 of float64, else float32."""
    generator = torch.Generator().manual_seed(seed)
    kept = kept or (torch.float64 if dtype == torch.float64 else torch.float32)

    def normal(*size: int, to: torch.dtype = kept) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=to)

    def rows(mean: float = 0.0) -> Tensor:
        values = normal(case.capacity, case.c, *case.trailing, to=torch.float64)
        # Channels differ, so that one taken for another shows.
        channels = torch.linspace(0.5, 2, case.c, dtype=torch.float64, device=device)
        values = values * channels.view(-1, *[1] * len(case.trailing)) + mean
        values[case.n :] = math.nan
        return laid_out(values.to(dtype), case.layout)

    return Inputs(
        x=rows(case.mean),
        residual=rows() if case.residual else None,
        d_y=rows(),
        count=torch.tensor(case.n, dtype=torch.int32, device=device),
        weight=normal(case.c) if case.weight else None,
        bias=normal(case.c) if case.bias else None,
        running_mean=normal(case.c) if case.running else None,
        running_var=normal(case.c).square() + 0.5 if case.running else None,
        num_batches_tracked=torch.tensor(BATCHES, device=device) if case.running else None,
    )


def normalised(case: Case, i: Inputs, backend: str) -> Tensor:
    """backend: as the public operation takes it, or "kernels" for Triton's without the checks."""
    if backend == "kernels":
        return kernels.masked_batch_norm(
            i.x, i.count, i.weight, i.bias, i.running_mean, i.running_var, i.num_batches_tracked,
            case.momentum, case.eps, case.activation, i.residual,
        )  # fmt: skip
    return HF.masked_batch_norm(
        i.x, i.count, i.weight, i.bias, i.running_mean, i.running_var, case.momentum, case.eps,
        case.activation, i.residual, backend, i.num_batches_tracked,
    )  # fmt: skip


def outcome(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """The result, the gradients and the statistics afterwards; the inputs' own do not move."""
    i = inputs.copy()
    y = normalised(case, i, backend)
    return {"y": y.detach()} | _gradients(y, i, inputs.d_y) | _statistics(i)


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same in float64, of the valid rows alone and with padded ones as zeros."""
    n, exact = case.n, {}
    for field in fields(inputs):
        tensor = getattr(inputs, field.name)
        if field.name in ("x", "residual", "d_y") and tensor is not None:
            tensor = tensor[:n]
        is_float = tensor is not None and tensor.is_floating_point()
        exact[field.name] = tensor.double() if is_float else tensor
    i = Inputs(**exact).copy()
    z = _batch_norm(case, i)
    if i.residual is not None:
        z = z + i.residual
    y = ACTIVATIONS[case.activation](z)
    found = {"y": y.detach()} | _gradients(y, i, i.d_y) | _statistics(i)
    for name in ("y", "d_x", "d_residual"):
        if name in found:
            padding = found[name].new_zeros(case.capacity - n, *found[name].shape[1:])
            found[name] = torch.cat([found[name], padding])
    return found


def _batch_norm(case: Case, i: Inputs) -> Tensor:
    if len(i.x) == 1 and case.running:
        return F.batch_norm(i.x, i.running_mean, i.running_var, i.weight, i.bias, eps=case.eps)
    if i.x.numel() <= case.c:  # of a single value or none F.batch_norm would have no variance
        per_channel = (-1, *[1] * len(case.trailing))
        z = (i.x - i.x.detach()) * 0
        z = z if i.weight is None else z * i.weight.view(per_channel)
        return z if i.bias is None else z + i.bias.view(per_channel)
    momentum = 1 / (BATCHES + 1) if case.momentum is None else case.momentum
    z = F.batch_norm(i.x, i.running_mean, i.running_var, i.weight, i.bias, True, momentum, case.eps)
    if case.running and len(i.x) > 1:
        i.num_batches_tracked += 1
    return z


def _gradients(y: Tensor, i: Inputs, d_y: Tensor) -> dict[str, Tensor]:
    leaves = {name: getattr(i, name) for name in LEAVES if getattr(i, name) is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), d_y)
    return {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _statistics(i: Inputs) -> dict[str, Tensor]:
    return {name: getattr(i, name) for name in STATISTICS if getattr(i, name) is not None}


def assert_exact(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float64: a few thousand roundings of 1.1e-16, relative to the largest of each tensor."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        size = right.abs().max().item() if right.numel() else 0.0
        assert_within(found[name], right, 1e-10 * size, f"{case.why}: {name}")
    assert_nothing_padded(case, found)


def assert_nothing_padded(case: Case, found: dict[str, Tensor]) -> None:
    for name in ("y", "d_x", "d_residual"):
        if name in found:
            assert not found[name][case.n :].any(), f"{case.why}: {name} of padded rows"


def assert_rounded(case: Case, inputs: Inputs, found: dict[str, Tensor]) -> None:
    """In float32 or less: within what its roundings can make of the result."""
    expected, bounds = truth(case, inputs), error_bounds(case, inputs)
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        bound = bounds.get(name, 0.0)
        if right.is_floating_point():  # 2**-24: the smallest that float16 tells from zero
            bound = bound + ROUNDING[found[name].dtype] * (right.abs() + bound) + 2.0**-24
        assert_within(found[name], right, bound, f"{case.why}: {name}")
    assert_nothing_padded(case, found)


def error_bounds(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Of what is computed in float32, before it is rounded to what it is stored as.

    Each step's roundings are relative to what it adds or multiplies, and carry on what the steps
    before were off by (``e_`` is how much). A derivative that jumps is off by its jump wherever z
    is nearer to it than z's own error, and there the sums over a channel may be off by as much.
    """
    n, over = case.n, (0, *range(2, inputs.x.dim()))
    x, d_y = inputs.x[:n].double(), inputs.d_y[:n].double()
    values = max(1, n * math.prod(case.trailing))

    def per_channel(tensor: Tensor | None, default: float) -> Tensor:
        tensor = x.new_full((case.c,), default) if tensor is None else tensor.double()
        return tensor.view(-1, *[1] * len(case.trailing))

    def total(tensor: Tensor) -> Tensor:
        return tensor.sum(over, keepdim=True)[0]

    weight, bias = per_channel(inputs.weight, 1.0), per_channel(inputs.bias, 0.0)
    chain = (min(values, CHAIN) + 8) * U
    if n == 1 and case.running:
        mean = per_channel(inputs.running_mean, 0.0)
        var, e_mean, e_var = per_channel(inputs.running_var, 0.0), 0 * mean, 0 * mean
    else:
        mean = total(x) / values
        centred = x - mean
        var = total(centred.square()) / values
        # A mean is taken of what is left over the first guess of it, so its own size counts once.
        e_mean = 2 * U * mean.abs() + chain * total(centred.abs()) / values
        e_var = chain * var + e_mean.square() + 2 * e_mean * total(centred.abs()) / values
    rstd = (var + case.eps).rsqrt()
    e_rstd = rstd * (4 * U + e_var / (var + case.eps) / 2)
    x_hat = (x - mean) * rstd
    e_x_hat = rstd * (e_mean + U * (x - mean).abs()) + (x - mean).abs() * e_rstd + U * x_hat.abs()
    residual = 0 * x if inputs.residual is None else inputs.residual[:n].double()
    z = x_hat * weight + bias + residual
    e_z = weight.abs() * e_x_hat + 3 * U * ((x_hat * weight).abs() + bias.abs() + residual.abs())
    bounds = {"y": 1.1 * e_z + 8 * U * z.abs()}

    # Where a residual was added, a derivative may be told from the result, as it was rounded.
    rounded = 0.0 if inputs.residual is None else ROUNDING[inputs.x.dtype]
    g, e_g = _through_activation(case.activation, z, e_z + rounded * z.abs(), d_y)
    bounds["d_residual"] = e_g
    d_bias, d_weight = total(g), total(g * x_hat)
    e_bias = total(e_g) + chain * total(g.abs())
    e_weight = total(e_g * x_hat.abs() + g.abs() * e_x_hat) + chain * total((g * x_hat).abs())
    bounds["d_bias"], bounds["d_weight"] = e_bias.flatten(), e_weight.flatten()
    if n == 1 and case.running:
        d_bias = d_weight = e_bias = e_weight = 0 * mean
    scale = weight.abs() * rstd
    if inputs.residual is not None and _STEEPEST[case.activation]:
        # The residual's gradient is what the second pass reads, rounded as it is stored.
        e_g = e_g + ROUNDING[inputs.x.dtype] * (g.abs() + e_g)
    parts = g.abs() + (d_bias.abs() + x_hat.abs() * d_weight.abs()) / values
    bounds["d_x"] = (6 * U + e_rstd / rstd) * scale * parts + scale * (
        e_g + (e_bias + x_hat.abs() * e_weight + e_x_hat * d_weight.abs()) / values
    )
    if inputs.running_mean is not None and n > 1:
        sizes = inputs.running_mean.double().abs() + mean.flatten().abs()
        bounds["running_mean"] = e_mean.flatten() + 4 * U * sizes
        sizes = inputs.running_var.double().abs() + 2 * var.flatten()
        bounds["running_var"] = 2 * e_var.flatten() + 8 * U * sizes
    for name in ("y", "d_x", "d_residual"):
        padding = bounds[name].new_zeros(case.capacity - n, *bounds[name].shape[1:])
        bounds[name] = torch.cat([bounds[name], padding])
    return bounds


def _through_activation(
    activation: str | None, z: Tensor, e_z: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor]:
    """What goes back through the activation, and how far off it may be."""
    leaf = z.detach().requires_grad_()
    (g,) = torch.autograd.grad(ACTIVATIONS[activation](leaf), leaf, d_y)
    off = _STEEPEST[activation] * e_z + 8 * U
    for at, jump in _JUMPS[activation].items():
        off = off + jump * ((z - at).abs() <= e_z)
    return g, d_y.abs() * off
