"""The operations to be timed: inputs of any size, each implementation, and the fewest bytes.

An ``Operation`` is one public operation on one set of inputs: the reference's lines for it, the
public function on either backend, what it is differentiated by, and how many bytes an ideal
implementation would have to move, each input read once and each result written once; what BatchNorm
normalises is read twice, since its statistics come first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hubpath_fast import Routing, reference
from hubpath_fast import functional as HF
from hubpath_fast.devices import full_float32

from .inputs import Inputs, Norm, Size


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


# Where a derivative jumps. Float32 may lie on another side of it than float64, and both be right.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def normalized(
    norm: Norm, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    *running: Tensor,
) -> Tensor:  # fmt: skip
    """torch's BatchNorm on exactly the valid rows, then a sum and an activation, then zeros for the
    other rows. running: mean and variance, moved in place."""
    kept = running or (None, None)
    y = F.batch_norm(x[: norm.valid], *kept, weight, bias, True, 0.1, 1e-5)
    if residual is not None:
        y = y + residual[: norm.valid]
    if norm.activation is not None:
        y = ACTIVATIONS[norm.activation](y)
    return torch.cat([y, y.new_zeros(len(x) - norm.valid, *y.shape[1:])])


def _masked_batch_norm(size: Size, inputs: Inputs) -> Operation:
    """Rows beyond the valid ones are NaN, and so is what they are differentiated by."""
    norm, c, device = size.norm, size.c, inputs.device
    shape = (size.n, c, *size.trailing)

    def rows(shift: Tensor | float = 0.0) -> Tensor:
        values = inputs.normal(*shape)
        if inputs.values:
            values.add_(shift)[norm.valid :] = float("nan")
        if len(shape) == 4 and norm.layout == "channels_last":
            values = values.contiguous(memory_format=torch.channels_last)
        return values.to(inputs.dtype)

    shift = inputs.normal(c).view(1, c, *[1] * len(size.trailing))
    leaves = [rows(shift), inputs.normal(c) / 4 + 1, inputs.normal(c)]
    leaves += [rows()] if norm.residual else []
    if inputs.values:
        _leave_kinks(norm, inputs, leaves)
    count = torch.tensor(norm.valid, dtype=torch.int32, device=device)
    running = torch.zeros(c, device=device), torch.ones(c, device=device)
    batches = torch.zeros((), dtype=torch.int64, device=device)

    def ours(backend, x, weight, bias, residual=None):
        return (
            HF.masked_batch_norm(
                x, count, weight, bias, *running, 0.1, 1e-5, norm.activation, residual, backend,
                batches,
            ),
        )  # fmt: skip

    # In whole tensors: reads are of the valid rows, writes of all.
    read = norm.valid * c * size.positions * inputs.dtype.itemsize
    write, vector = size.n * c * size.positions * inputs.dtype.itemsize, c * 4
    # With both, the residual's gradient is what remains of dy behind the activation: the first pass
    # reads y (or the residual) for it, the second takes it instead of dy.
    derivative = read if norm.residual and norm.activation else 0
    names = ("x", "weight", "bias", *["residual"] * norm.residual)
    return Operation(
        "masked_batch_norm", size, names, [leaf.requires_grad_() for leaf in leaves],
        ("y",), [rows()], lambda *given: (normalized(norm, *given),), ours,
        (2 + norm.residual) * read + write + 8 * vector,  # statistics of the batch, those kept
        4 * read + derivative + (1 + norm.residual) * write + 5 * vector,
    )  # fmt: skip


def _leave_kinks(norm: Norm, inputs: Inputs, leaves: list[Tensor]) -> None:
    """Draws elements again whose activation is next to a kink, in place: of what is added last."""
    kinks, drawn = KINKS.get(norm.activation, ()), leaves[3] if norm.residual else leaves[0]
    while kinks:
        plain = norm._replace(activation=None)
        z = normalized(plain, *(leaf.double() for leaf in leaves))
        # Some units in 1e7 of float32 each: the statistics, the product, the sum.
        close = sum((z - kink).abs() < 1e-5 for kink in kinks).bool()
        close[norm.valid :] = False
        count = int(close.sum())
        if count == 0:
            return
        drawn[close] = inputs.normal(count).to(drawn.dtype)


_MAKERS = {
    "noisy_topk": _noisy_topk,
    "gather": _gather,
    "combine": _combine,
    "aggregate": _aggregate,
    "exploit_loss": _exploit_loss,
    "masked_batch_norm": _masked_batch_norm,
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


def tolerance(operation: Operation, row: str) -> float:
    """Of a row that is to be timed."""
    bound = TOLERANCE[operation.size.dtype]
    norm = operation.size.norm
    if row in ("reference", "compiled") and norm is not None and norm.activation:
        # In half precision torch's layers round before the activation, which then lets other
        # elements through, of which each is wrong by all of its gradient.
        return 3 * bound
    return bound


def error(operation: Operation, row: str, expected: list[Tensor]) -> float:
    """The largest relative error of the results and the gradients; NaN is infinite."""
    with full_float32():
        pairs = zip(found(operation, row), expected, strict=True)
        return max(relative_error(ours, right) for ours, right in pairs)


def relative_error(found: Tensor, right: Tensor) -> float:
    """||found - right|| / ||right||; NaN is infinite."""
    ratio = ((found.double() - right).norm() / right.norm().clamp_min(1e-30)).item()
    return ratio if ratio == ratio else float("inf")
