"""The operations to be timed: inputs of any size, each implementation, and the fewest bytes.

An ``Operation`` is one public operation on one set of inputs: the reference's lines for it, the
public function on either backend, what it is differentiated by, and how many bytes an ideal
implementation would have to move, each input read once and each result written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hubpath_fast import functional as HF
from hubpath_fast import reference

NAMES = ("noisy_topk", "gather", "combine", "aggregate", "exploit_loss")
ROUTINGS = ("balanced", "skewed")


class Size(NamedTuple):
    """N samples, M experts, K active, C outputs (features for gather), and how rows spread."""

    n: int
    m: int
    k: int
    c: int
    routing: str = "balanced"
    dtype: str = "float32"

    def __str__(self) -> str:
        text = f"N={self.n} M={self.m} K={self.k} C={self.c} {self.routing}"
        return text if self.dtype == "float32" else f"{text} {self.dtype}"


@dataclass
class Operation:
    """``reference`` and ``ours`` take the leaves; ``ours`` a backend too. Results are tuples."""

    name: str
    size: Size
    leaves: list[Tensor]
    upstream: list[Tensor]  # gradients of the results
    reference: Callable[..., tuple[Tensor, ...]]
    ours: Callable[..., tuple[Tensor, ...]]
    forward_bytes: int
    backward_bytes: int

    def bytes(self, direction: str) -> int:
        forward, backward = self.forward_bytes, self.backward_bytes
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def double(self) -> Operation:
        """The same in float64."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return replace(self, leaves=leaves, upstream=[u.double() for u in self.upstream])


def scores(
    n: int, m: int, k: int, device: str, random: torch.Generator, skewed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """clean, noise and eps [N, M] whose K largest p are clearly apart, and apart from the rest.

    Float32 may order two almost equal probabilities otherwise than float64, and both be right;
    one such sample among many would look like a wrong result. Such samples are drawn again.
    """

    def normal() -> Tensor:
        return torch.randn((n, m), generator=random, device=device)

    noise, eps = normal(), normal()
    # Skewed: the first expert is e^6 times as likely as the last.
    favour = torch.linspace(6, 0, m, device=device) if skewed else 0.0
    clean = normal() + favour
    while True:
        z = clean.double() + eps.double() * F.softplus(noise.double())
        largest = z.topk(min(k + 1, m), dim=1).values
        close = (largest.diff(dim=1) > -1e-4).any(dim=1)
        if not close.any():
            return clean, noise, eps
        clean[close] = (normal() + favour)[close]


def make(name: str, size: Size, device: str, seed: int = 0) -> Operation:
    """Random inputs for one operation, its parameters scaled so that results are of size one."""
    n, m, k, c = size[:4]
    dtype = getattr(torch, size.dtype)
    rows, item = n * k, dtype.itemsize
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return normal(*shape).mul_(scale).to(dtype).requires_grad_()

    clean, noise, eps = scores(n, m, k, device, random, size.routing == "skewed")
    if name == "noisy_topk":
        all_scores = n * m * clean.element_size()
        leaves = [clean.requires_grad_(), noise.requires_grad_()]

        def routed(implementation, clean, noise, **options):
            found = implementation.noisy_topk(clean, noise, k, eps, **options)
            return found.weights, found.mean

        return Operation(
            name, size, leaves, [normal(n, k), normal(m)],
            lambda *leaves: routed(reference, *leaves),
            lambda backend, *leaves: routed(HF, *leaves, backend=backend),
            3 * all_scores + rows * (4 + 8 + 4 + 4) + m * 8,  # weights, experts, rows, positions
            5 * all_scores + rows * (4 + 8) + m * 4,
        )  # fmt: skip

    routing = HF.noisy_topk(clean, noise, k, eps, backend="torch")
    experts, offsets, plan = routing.experts, routing.offsets.tolist(), rows * 4
    if name == "gather":
        return Operation(
            name, size, [leaf(n, c)], [normal(rows, c).to(dtype)],
            lambda x: (torch.cat([x[(experts == i).any(dim=1)] for i in range(m)]),),
            lambda backend, x: (HF.gather(x, routing, backend=backend),),
            (n + rows) * c * item + plan,
            (n + rows) * c * item + plan,
        )  # fmt: skip

    if name == "exploit_loss":
        target = torch.randint(c, (n,), generator=random, device=device)

        def loss(outputs):
            sample = routing.rows.long() // k
            return (F.cross_entropy(outputs.float(), target[sample], reduction="sum") / n,)

        def loss_double(outputs):
            sample = routing.rows.long() // k
            return (F.cross_entropy(outputs, target[sample], reduction="sum") / n,)

        return Operation(
            name, size, [leaf(rows, c)], [torch.ones((), device=device)],
            lambda x: loss_double(x) if x.dtype == torch.float64 else loss(x),
            lambda backend, x: (HF.exploit_loss(x, routing, target, backend=backend),),
            rows * c * item + plan + n * 8,
            2 * rows * c * item + plan + n * 8,
        )  # fmt: skip

    def concat(outputs, weights):
        parts = []
        for i in range(m):
            active = experts == i
            part = outputs.new_zeros(n, c)
            weight = weights[active].to(outputs.dtype).unsqueeze(1)
            part[active.any(dim=1)] = weight * outputs[offsets[i] : offsets[i + 1]]
            parts.append(part)
        return torch.cat(parts, dim=1)

    outputs, weights = leaf(rows, c), routing.weights.detach().requires_grad_()
    if name == "combine":
        return Operation(
            name, size, [outputs, weights], [normal(n, m * c).to(dtype)],
            lambda outputs, weights: (concat(outputs, weights),),
            lambda backend, outputs, weights: (
                HF.combine(outputs, replace(routing, weights=weights), backend=backend),
            ),
            (rows * c + n * m * c) * item + rows * (4 + 8 + 4),
            3 * rows * c * item + rows * (4 + 8 + 4 + 4),
        )  # fmt: skip

    matrix, bias = leaf(c, m * c, scale=c**-0.5), leaf(c)
    block = c * m * c * item
    return Operation(
        name, size, [outputs, weights, matrix, bias], [normal(n, c).to(dtype)],
        lambda outputs, weights, *linear: (F.linear(concat(outputs, weights), *linear),),
        lambda backend, outputs, weights, *linear: (
            HF.aggregate(outputs, replace(routing, weights=weights), *linear, backend=backend),
        ),
        (rows + n + 1) * c * item + block + rows * 8,
        (2 * rows + n + 1) * c * item + 2 * block + rows * 12,
    )  # fmt: skip


def function(operation: Operation, row: str, direction: str) -> Callable[[], object]:
    """What is timed: one call of one implementation in one direction.

    Backward differentiates one kept forward again and again.
    """
    leaves, upstream = operation.leaves, operation.upstream
    forward = implementation(operation, row)
    if direction == "forward":
        return lambda: forward(*leaves)
    if direction == "both":
        return lambda: torch.autograd.grad(forward(*leaves), leaves, upstream)
    kept = forward(*leaves)
    return lambda: torch.autograd.grad(kept, leaves, upstream, retain_graph=True)


def implementation(operation: Operation, row: str) -> Callable[..., tuple[Tensor, ...]]:
    if row == "reference":
        return operation.reference
    if row == "compiled":
        torch._dynamo.reset()
        return torch.compile(operation.reference)
    return lambda *leaves: operation.ours(row, *leaves)


def truth(operation: Operation) -> list[Tensor]:
    """Results and gradients of the reference in float64."""
    wide = operation.double()
    results = wide.reference(*wide.leaves)
    grads = torch.autograd.grad(results, wide.leaves, wide.upstream)
    return [*(result.detach() for result in results), *grads]


# ||found - truth|| / ||truth|| over sums of up to 64,000 products: float32 without tf32 stays
# below 1e-5, bfloat16 operands below 1e-2 (see the unit roundoffs 6e-8 and 4e-3).
TOLERANCE = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}


def error(operation: Operation, row: str, expected: list[Tensor]) -> float:
    """The largest relative error of the results and the gradients; NaN is infinite."""
    leaves = operation.leaves
    results = implementation(operation, row)(*leaves)
    grads = torch.autograd.grad(results, leaves, operation.upstream)
    worst = 0.0
    for found, right in zip((*results, *grads), expected, strict=True):
        ratio = ((found.detach() - right).norm() / right.norm().clamp_min(1e-30)).item()
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst
