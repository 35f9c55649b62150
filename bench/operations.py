"""The operations to be timed: inputs of any size, each implementation, and the fewest bytes.

An ``Operation`` is one public operation on one set of inputs: the reference's lines for it, the
public function on either backend, what it is differentiated by, and how many bytes an ideal
implementation would have to move, each input read once and each result written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hubpath_fast import Routing, reference
from hubpath_fast import functional as HF

from .precision import full_float32

ROUTINGS = ("balanced", "skewed")


class Size(NamedTuple):
    """N samples, M experts, K active, C outputs (features for gather), and how rows spread.

    trailing: of maps, which aggregate takes: height and width, or a length.
    """

    n: int
    m: int
    k: int
    c: int
    routing: str = "balanced"
    dtype: str = "float32"
    trailing: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """Of a map; 1 without."""
        return math.prod(self.trailing)

    def __str__(self) -> str:
        maps = f" {'x'.join(map(str, self.trailing))}" if self.trailing else ""
        text = f"N={self.n} M={self.m} K={self.k} C={self.c}{maps} {self.routing}"
        return text if self.dtype == "float32" else f"{text} {self.dtype}"


@dataclass
class Operation:
    """``reference`` and ``ours`` take the leaves; ``ours`` a backend too. Results are tuples.

    results, inputs: names of the results and of the leaves. Bytes are None where nobody asks.
    dense: like ``ours``, another form of it that is slower for many experts, where there is one.
    """

    name: str
    size: Size
    inputs: tuple[str, ...]
    leaves: list[Tensor]
    results: tuple[str, ...]
    upstream: list[Tensor]  # gradients of the results
    reference: Callable[..., tuple[Tensor, ...]]
    ours: Callable[..., tuple[Tensor, ...]]
    forward_bytes: int | None = None
    backward_bytes: int | None = None
    dense: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def labels(self) -> list[str]:
        """Of what ``found`` gives: the results and the gradients."""
        return [*self.results, *(f"d_{name}" for name in self.inputs)]

    def bytes(self, direction: str) -> int:
        forward, backward = self.forward_bytes, self.backward_bytes
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def own_leaves(self) -> list[Tensor]:
        """Leaves of the same values that no graph of autograd has met."""
        return [leaf.detach().requires_grad_() for leaf in self.leaves]

    def double(self) -> Operation:
        """The same in float64."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return replace(self, leaves=leaves, upstream=[u.double() for u in self.upstream])


class Inputs:
    """Makes the tensors of one size. seed: None leaves them uninitialised, for who only compiles.

    Parameters are scaled so that results are of size one.
    """

    def __init__(self, size: Size, device: str, seed: int | None = 0):
        self.size, self.device, self.values = size, device, seed is not None
        self.dtype = getattr(torch, size.dtype)
        self.random = torch.Generator(device).manual_seed(seed or 0)

    def normal(self, *shape: int) -> Tensor:
        if not self.values:
            return torch.empty(shape, device=self.device)
        return torch.randn(shape, generator=self.random, device=self.device)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = self.normal(*shape)
        if self.values:
            values.mul_(scale)
        return values.to(self.dtype).requires_grad_()

    def upstream(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(self.dtype)

    def target(self) -> Tensor:
        if not self.values:
            return torch.zeros(self.size.n, dtype=torch.int64, device=self.device)
        shape = (self.size.n,)
        return torch.randint(self.size.c, shape, generator=self.random, device=self.device)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        n, m, k = self.size[:3]
        if not self.values:
            clean, noise, eps = (self.normal(n, m) for _ in range(3))
            return clean, noise, eps
        return scores(n, m, k, self.device, self.random, self.size.routing == "skewed")

    def routing(self) -> Routing:
        n, m, k = self.size[:3]
        clean, noise, eps = self.scores()
        if self.values:
            return HF.noisy_topk(clean, noise, k, eps, backend="torch")
        integers = ((m + 1,), (n * k,), (n, k))
        plan = [torch.empty(s, dtype=torch.int32, device=self.device) for s in integers]
        experts = torch.empty((n, k), dtype=torch.int64, device=self.device)
        return Routing(self.normal(n, k), self.normal(m), experts, *plan)


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


def make(name: str, size: Size, device: str, seed: int | None = 0) -> Operation:
    """One operation on random inputs; see ``Inputs``."""
    return _MAKERS[name](size, Inputs(size, device, seed))


def _noisy_topk(size: Size, inputs: Inputs) -> Operation:
    n, m, k = size[:3]
    clean, noise, eps = inputs.scores()
    all_scores, rows = n * m * clean.element_size(), n * k

    def routed(implementation, clean, noise, **options):
        found = implementation.noisy_topk(clean, noise, k, eps, **options)
        return found.weights, found.mean

    return Operation(
        "noisy_topk", size,
        ("clean", "noise"), [clean.requires_grad_(), noise.requires_grad_()],
        ("weights", "mean"), [inputs.normal(n, k), inputs.normal(m)],
        lambda *leaves: routed(reference, *leaves),
        lambda backend, *leaves: routed(HF, *leaves, backend=backend),
        3 * all_scores + rows * (4 + 8 + 4 + 4) + m * 8,  # weights, experts, rows, positions
        5 * all_scores + rows * (4 + 8) + m * 4,
    )  # fmt: skip


def _gather(size: Size, inputs: Inputs) -> Operation:
    n, m, k, c = size[:4]
    routing, rows = inputs.routing(), n * k
    moved = (n + rows) * c * inputs.dtype.itemsize + rows * 4

    def loop(x):
        return (torch.cat([x[(routing.experts == i).any(dim=1)] for i in range(m)]),)

    return Operation(
        "gather", size, ("x",), [inputs.leaf(n, c)], ("rows",), [inputs.upstream(rows, c)],
        loop, lambda backend, x: (HF.gather(x, routing, backend=backend),), moved, moved,
    )  # fmt: skip


def _exploit_loss(size: Size, inputs: Inputs) -> Operation:
    n, _, k, c = size[:4]
    routing, target, rows = inputs.routing(), inputs.target(), n * k
    once = rows * c * inputs.dtype.itemsize
    return Operation(
        "exploit_loss", size, ("outputs",), [inputs.leaf(rows, c)],
        ("loss",), [torch.ones((), device=inputs.device)],
        lambda outputs: (rows_loss(outputs, routing, target),),
        lambda backend, x: (HF.exploit_loss(x, routing, target, backend=backend),),
        once + rows * 4 + n * 8, 2 * once + rows * 4 + n * 8,
    )  # fmt: skip


def rows_loss(outputs: Tensor, routing: Routing, target: Tensor) -> Tensor:
    """Equation 5 by torch's cross-entropy over all rows; float64 in float64."""
    sample = routing.rows.long() // routing.k
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    return F.cross_entropy(outputs, target[sample], reduction="sum") / routing.num_samples


def concat_loop(outputs: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """The concatenation as the reference builds it: by expert, with boolean masks."""
    parts, start = [], 0
    for i, count in enumerate(routing.counts()):
        active = routing.experts == i
        part = outputs.new_zeros(routing.num_samples, *outputs.shape[1:])
        weight = weights[active].to(outputs.dtype).view(-1, *[1] * (outputs.dim() - 1))
        part[active.any(dim=1)] = weight * outputs[start : start + count]
        parts.append(part)
        start += count
    return torch.cat(parts, dim=1)


def _combine(size: Size, inputs: Inputs) -> Operation:
    n, m, k, c = size[:4]
    routing, rows, item = inputs.routing(), n * k, inputs.dtype.itemsize
    weights = routing.weights.detach().requires_grad_()
    return Operation(
        "combine", size, ("outputs", "weights"), [inputs.leaf(rows, c), weights],
        ("concat",), [inputs.upstream(n, m * c)],
        lambda outputs, weights: (concat_loop(outputs, weights, routing),),
        lambda backend, outputs, weights: (
            HF.combine(outputs, replace(routing, weights=weights), backend=backend),
        ),
        (rows * c + n * m * c) * item + rows * (4 + 8 + 4),
        3 * rows * c * item + rows * (4 + 8 + 4 + 4),
    )  # fmt: skip


def _aggregate(size: Size, inputs: Inputs) -> Operation:
    n, m, k, c = size[:4]
    routing, rows, item = inputs.routing(), n * k, inputs.dtype.itemsize
    weights, block = routing.weights.detach().requires_grad_(), c * m * c * item
    leaves = [
        inputs.leaf(rows, c, *size.trailing), weights,
        inputs.leaf(c, m * c, scale=c**-0.5), inputs.leaf(c),
    ]  # fmt: skip

    def dense(backend, outputs, weights, *linear):
        concat = HF.combine(outputs, replace(routing, weights=weights), backend=backend)
        return (linear_over_channels(concat, *linear),)

    of_maps = c * size.positions * item
    return Operation(
        "aggregate", size, ("outputs", "weights", "matrix", "bias"), leaves,
        ("y",), [inputs.upstream(n, c, *size.trailing)],
        lambda outputs, weights, *linear: (
            linear_over_channels(concat_loop(outputs, weights, routing), *linear),
        ),
        lambda backend, outputs, weights, *linear: (
            HF.aggregate(outputs, replace(routing, weights=weights), *linear, backend=backend),
        ),
        (rows + n) * of_maps + c * item + block + rows * 8,
        (2 * rows + n) * of_maps + c * item + 2 * block + rows * 12, dense,
    )  # fmt: skip


def linear_over_channels(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """Of [N, C, ...], at every position alike."""
    return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)


_MAKERS = {
    "noisy_topk": _noisy_topk,
    "gather": _gather,
    "combine": _combine,
    "aggregate": _aggregate,
    "exploit_loss": _exploit_loss,
}
NAMES = tuple(_MAKERS)


def function(operation: Operation, row: str, direction: str) -> Callable[[], object]:
    """What is timed: one call of one implementation in one direction.

    Backward differentiates one kept forward again and again. Each function has leaves of its own:
    what accumulates a leaf's gradients belongs to the stream of the first forward that met it, as
    long as any such forward is kept, and a capture on another stream would have to wait for that.
    """
    leaves, upstream = operation.own_leaves(), operation.upstream
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
    if row == "dense":
        backend = "triton" if operation.leaves[0].is_cuda else "torch"
        return lambda *leaves: operation.dense(backend, *leaves)
    return lambda *leaves: operation.ours(row, *leaves)


def found(operation: Operation, row: str) -> list[Tensor]:
    """Results and gradients of an implementation, in the order of ``operation.labels``."""
    leaves = operation.own_leaves()
    results = implementation(operation, row)(*leaves)
    grads = torch.autograd.grad(results, leaves, operation.upstream) if leaves else ()
    return [*(result.detach() for result in results), *grads]


def truth(operation: Operation) -> list[Tensor]:
    """Results and gradients of the reference in float64."""
    return found(operation.double(), "reference")


# ||found - truth|| / ||truth|| over sums of up to 64,000 products: float32 without tf32 stays
# below 1e-5, bfloat16 operands below 1e-2 (see the unit roundoffs 6e-8 and 4e-3).
TOLERANCE = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}


def error(operation: Operation, row: str, expected: list[Tensor]) -> float:
    """The largest relative error of the results and the gradients; NaN is infinite."""
    with full_float32():
        pairs = zip(found(operation, row), expected, strict=True)
        return max(relative_error(ours, right) for ours, right in pairs)


def relative_error(found: Tensor, right: Tensor) -> float:
    """||found - right|| / ||right||; NaN is infinite."""
    ratio = ((found.double() - right).norm() / right.norm().clamp_min(1e-30)).item()
    return ratio if ratio == ratio else float("inf")
