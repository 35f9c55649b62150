"""Inputs, references and bounds shared by the tests of combine, aggregate and exploit_loss.

The references are loops over the experts in float64, as in ``hubpath_fast.reference``. Bounds are
derived: the operations are sums of products, so evaluating the reference on absolute values gives
sum |terms|, which every rounding error is relative to.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from hubpath_fast.reference import noisy_topk

INTERPRETED = triton.knobs.runtime.interpret
# Largest relative error of one rounding. Triton's interpreter truncates to bfloat16, which costs
# twice what rounding to nearest does on a device.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
}


@dataclass(frozen=True)
class Case:
    why: str
    n: int = 13
    m: int = 5
    k: int = 2
    c: int = 10
    c_out: int = 7
    trailing: tuple[int, ...] = ()
    channels_last: bool = False
    scores: str = "random"  # or "one": all rows to the first K; "gaps": the odd experts get none


CASES = [
    Case("paper's size", n=48, c=100, c_out=20),
    Case("C=10: half a tile, 8-byte rows"),
    Case("C=37: odd, no vector loads", c=37, c_out=37),
    Case("C=1: contiguous and channels last at once", c=1, c_out=1, trailing=(3,)),
    Case("C=130 > C_OUT: two tiles of one, one of the other", c=130, c_out=5),
    Case("C_OUT > C", c=3, c_out=70),
    Case("single row", n=1, m=3, k=1),
    Case("M=1", m=1, k=1),
    Case("K=M: no zeros", m=4, k=4),
    Case("experts without rows", m=6, scores="gaps"),
    Case("all rows to K experts", n=33, scores="one"),
    Case("M=19, K=3: neither a power of two", m=19, k=3),
    Case("N=257: one beyond a block", n=257, c=3, c_out=2),
    Case("maps", n=5, trailing=(3, 5)),
    Case("maps of 16: one sample per vector", n=5, c=5, trailing=(4, 8)),
    Case("maps, channels last", n=5, trailing=(3, 5), channels_last=True),
    Case("sequences in channels last", n=4, trailing=(6,), channels_last=True),
]  # fmt: skip
TINY = Case("tiny", n=3, m=3, k=2, c=3, c_out=2)
TINY_LAST = Case("tiny map", n=2, m=2, k=1, c=2, c_out=2, trailing=(2,), channels_last=True)
SMALL = Case("small", n=6, m=4, k=2, c=5, c_out=3)
SMALL_MAPS = replace(SMALL, why="small maps", trailing=(2, 3))
SMALL_LAST = replace(SMALL_MAPS, why="small maps, channels last", channels_last=True)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
# What a fused node can get wrong beyond its parts: layouts, tiles of C and C_OUT, empty groups.
fused_cases = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.trailing or case.c > 100 or case.scores == "gaps"],
    ids=lambda case: case.why,
)
small_cases = pytest.mark.parametrize(
    "case", [SMALL, SMALL_MAPS, SMALL_LAST], ids=lambda case: case.why
)
tiny_cases = pytest.mark.parametrize("case", [TINY, TINY_LAST], ids=lambda case: case.why)
float_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)


@dataclass
class Inputs:
    """Of every operation; it is the plan of its rows, too."""

    outputs: Tensor
    weights: Tensor
    experts: Tensor
    rows: Tensor
    positions: Tensor
    offsets: Tensor
    matrix: Tensor
    bias: Tensor
    target: Tensor
    d_concat: Tensor
    d_y: Tensor

    @property
    def sources(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operations on the experts' outputs are differentiable in."""
        return self.outputs, self.weights, self.matrix, self.bias

    @property
    def num_samples(self) -> int:
        return self.experts.shape[0]

    @property
    def num_experts(self) -> int:
        return len(self.offsets) - 1

    @property
    def k(self) -> int:
        return self.experts.shape[1]


def layout(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else tensor


def make(case: Case, dtype: torch.dtype, device="cpu", seed: int = 0) -> Inputs:
    """Random inputs of a case; the routing comes from the reference, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    n, m, k, c = case.n, case.m, case.k, case.c
    scores = normal(n, m)
    if case.scores == "one":
        scores[:, :k] += 100
    elif case.scores == "gaps":
        scores[:, 1::2] -= 100
    weights, _, *routing = noisy_topk(scores, scores, k)
    experts, offsets, rows, positions = routing
    target = torch.randint(c, (n, *case.trailing), generator=generator)
    values = (
        layout(normal(n * k, c, *case.trailing), case.channels_last),
        normal(case.c_out, m * c) / (m * c) ** 0.5,
        normal(case.c_out),
        layout(normal(n, m * c, *case.trailing), case.channels_last),
        layout(normal(n, case.c_out, *case.trailing), case.channels_last),
    )
    outputs, matrix, bias, d_concat, d_y = (v.to(device=device, dtype=dtype) for v in values)
    weights = weights.contiguous().to(torch.float64 if dtype == torch.float64 else torch.float32)
    integers = (t.contiguous().to(device) for t in (experts, rows, positions, offsets))
    return Inputs(
        outputs, weights.to(device), *integers, matrix, bias, target.to(device), d_concat, d_y
    )


def concat_reference(outputs: Tensor, weights: Tensor, inputs: Inputs) -> Tensor:
    """Expert by expert: its rows, weighted, put where their samples are; zeros elsewhere."""
    n, k = inputs.experts.shape
    offsets, parts = inputs.offsets.tolist(), []
    for begin, end in pairwise(offsets):
        slots = inputs.rows[begin:end].long()
        w = weights.flatten()[slots].view(-1, *[1] * (outputs.dim() - 1))
        zeros = outputs.new_zeros(n, *outputs.shape[1:])
        parts.append(zeros.index_put((slots // k,), w * outputs[begin:end]))
    return torch.cat(parts, dim=1)


def aggregate_reference(outputs, weights, matrix, bias, inputs: Inputs) -> Tensor:
    concat = concat_reference(outputs, weights, inputs).movedim(1, -1)
    return F.linear(concat, matrix, bias).movedim(-1, 1)


def loss_reference(outputs: Tensor, inputs: Inputs, smoothing=0.0, ignore_index=-100) -> Tensor:
    n, k = inputs.experts.shape
    target = inputs.target[inputs.rows.long() // k]
    losses = F.cross_entropy(
        outputs, target, reduction="none", label_smoothing=smoothing, ignore_index=ignore_index
    )
    return losses.flatten(1).mean(1).sum() / n if losses.dim() > 1 else losses.sum() / n


def router_reference(outputs, weights, inputs: Inputs, temperature, smoothing=0.0) -> Tensor:
    """KL(q || r), the mean over the samples; the outputs are taken as numbers."""
    target = inputs.target[inputs.rows.long() // inputs.k]
    losses = F.cross_entropy(outputs.detach(), target, reduction="none", label_smoothing=smoothing)
    losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
    log_q = (-losses[inputs.positions.long()] / temperature).log_softmax(1)
    log_r = (weights / weights.sum(1, keepdim=True)).log()
    return (log_q.exp() * (log_q - log_r)).sum(1).mean()


def router_bounds(outputs, weights, temperature, unit) -> tuple[float, Tensor]:
    """(of the loss, of its gradient in the weights): roundings of size ``unit``, relative.

    A row's loss is off by at most 160 units of about 1 + max|x| (see the exploit loss), so z = -l /
    tau by that over tau, and q by as much, relatively, twice over with its sum; a logarithm of q or
    r is one of those more, of a value of about |z| + |log w|. The gradient is q / w and 1 / sum w,
    over N.
    """
    size = 1 + outputs.detach().double().abs().max().item()
    off = unit * (320 * size / temperature + 8)
    logs = 2 * size / temperature + weights.detach().double().log().abs().max().item()
    k, n = weights.shape[1], len(weights)
    return k * off * (1 + logs), 2 * off / weights.detach().double() / n


def double(*tensors: Tensor, absolute: bool = False) -> list[Tensor]:
    """Leaves in float64 to differentiate a reference in."""
    values = (t.detach().double() for t in tensors)
    return [(v.abs() if absolute else v.clone()).requires_grad_() for v in values]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """|actual - expected| <= bound everywhere; says where it is worst."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} {list(expected.shape)}"
    error = (actual.detach().double() - expected.detach()).abs()
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device).expand_as(error)
    bad = ~(error <= bound)  # NaN is bad
    if bad.any():
        excess = torch.where(bad, (error - bound).nan_to_num(nan=float("inf")), -1.0)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), error.shape))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {error.numel()} beyond their bound; at {worst} "
            f"{actual[worst].item()} for {expected[worst].item()}, bound {bound[worst].item():.3g}"
        )


@contextmanager
def poisoned():
    """Uninitialised memory holds NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        assert torch.ones(1).new_empty((2, 2)).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
