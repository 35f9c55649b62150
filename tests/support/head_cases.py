"""Heads of all experts on features that lie there, for the tests of ``kernels.feature_heads``.

The reference is a loop over experts in float64. Sums have as many terms as features or rows, and
the reference on absolute values gives sum |terms|, which rounding errors are relative to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hubpath_fast.kernels import feature_heads, head_table, update_heads
from torch import Tensor

from hubpath_fast.reference import noisy_topk

from .output_cases import ROUNDING

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    why: str
    widths: tuple[int, ...] = (32, 16, 48, 32)
    n: int = 9
    k: int = 2
    c: int = 5
    images: int = 11
    idle: bool = False  # the odd experts get no rows
    numbered: bool = True


CASES = [
    Case("different D"),
    Case("D=37 and 70: odd, no vector loads, two tiles", (37, 70, 3)),
    Case("C=100 and D=130: two tiles of C, three of D", (130, 64, 16), n=12, c=100),
    Case("more rows than a tile", (16, 32), n=40, k=1),
    Case("many rows per expert: large tiles", (20, 16), n=100),
    Case("experts without rows", idle=True),
    Case("single row", (24, 16, 8), n=1, k=1, c=1),
    Case("M=1", (16,), k=1),
    Case("each expert's rows alone, in their order", (16, 24, 5), numbered=False),
]


class Problem:
    """Of a case: features by expert, flat weights, and a routing."""

    def __init__(self, case: Case, dtype, features=None, device="cpu"):
        draw = torch.Generator().manual_seed(0)
        m, c = len(case.widths), case.c
        self.case, self.k = case, case.k

        def normal(*size):
            return torch.randn(*size, generator=draw, dtype=FP64)

        scores = normal(case.n, m)
        if case.idle:
            scores[:, 1::2] -= 100
        _, _, _, offsets, rows, _ = noisy_topk(scores, scores, case.k)
        self.rows, self.offsets = rows.int().to(device), offsets.int().to(device)
        self.numbers = torch.randint(case.images, (case.n,), generator=draw)
        sample = rows.long() // case.k
        self.own = [sample[offsets[i] : offsets[i + 1]] for i in range(m)]
        counts = [len(own) for own in self.own]
        images = [case.images] * m if case.numbered else counts
        self.features = [
            normal(count, d).to(features or dtype)
            for count, d in zip(images, case.widths, strict=True)
        ]
        weights = [normal(c, d).to(dtype) for d in case.widths]
        self.flat = torch.cat([f.flatten() for f in self.features]).to(device)
        starts = [sum(f.numel() for f in self.features[:i]) for i in range(m)]
        table = head_table(starts, case.widths, c)
        self.table = table._replace(table=table.table.to(device))
        biases = normal(m, c).to(dtype)
        flat = torch.cat([w.flatten() for w in (*weights, biases)])
        self.parameters = flat.to(device).requires_grad_()
        self.touched = torch.zeros(m, dtype=torch.int32, device=device)
        self.d_out = normal(len(rows), c).to(dtype).to(device)

    def __call__(self) -> Tensor:
        numbers = self.numbers.double().to(self.flat.device) if self.case.numbered else None
        return feature_heads(
            self.parameters, self.flat, numbers, self.rows, self.offsets, self.k, self.table,
            self.touched,
        )  # fmt: skip

    def split(self, flat: Tensor) -> tuple[list[Tensor], Tensor]:
        """Weights [C, D] of each expert, and biases [M, C], as views."""
        c, widths = self.case.c, self.case.widths
        *weights, biases = flat.split([*(c * d for d in widths), c * len(widths)])
        parts = zip(weights, widths, strict=True)
        return [part.view(c, d) for part, d in parts], biases.view(-1, c)

    def seen(self, i: int) -> Tensor:
        features = self.features[i].double()
        return features[self.numbers[self.own[i]]] if self.case.numbered else features

    def expected(self, absolute: bool = False) -> tuple[Tensor, Tensor]:
        """Outputs and the gradient in float64; of absolute values: what errors are relative to."""
        of = torch.abs if absolute else lambda x: x
        out, d_weights, d_biases, start = [], [], [], 0
        weights, biases = self.split(of(self.parameters.detach().cpu().double()))
        d_out = of(self.d_out.cpu().double())
        for i, weight in enumerate(weights):
            x, own = of(self.seen(i)), d_out[start : start + len(self.own[i])]
            out.append(x @ weight.T + biases[i])
            d_weights.append((own.T @ x).flatten())
            d_biases.append(own.sum(0))
            start += len(own)
        return torch.cat(out), torch.cat([*d_weights, *d_biases])


def results(problem: Problem) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradient of the parameters."""
    out = problem()
    return out, *torch.autograd.grad(out, problem.parameters, problem.d_out)


def assert_exact(problem: Problem) -> None:
    """Outputs and gradients are those of the loop, within the roundings of the dtype."""
    dtype = problem.parameters.dtype
    terms = max(problem.table.widest, problem.case.n) + 2
    # Sums in float32 at least; operands and result are rounded to the dtype of the weights.
    relative = terms * ROUNDING[FP64 if dtype == FP64 else FP32] + 3 * ROUNDING[dtype]
    bounds = problem.expected(absolute=True)
    for found, exact, bound in zip(results(problem), problem.expected(), bounds, strict=True):
        assert found.dtype == dtype
        error = (found.detach().cpu().double() - exact).abs()
        assert (error <= relative * bound + 1e-30).all(), (error / bound.clamp(1e-30)).max()


def check_updates(dtype: torch.dtype, device="cpu", c: int = 5) -> None:
    """A parameter for each expert with torch's AdamW, to which an expert without rows gives none.
    A step is at most about the rate, 1e-2, and has some twenty roundings; then the parameter, of up
    to 4, is rounded twice."""
    case, steps = Case("", (40, 16, 3, 24), c=c), 6
    problem = Problem(case, dtype, FP32, device)
    draw = torch.Generator().manual_seed(1)
    flat = problem.parameters.detach()
    gradient, m, v = torch.empty_like(flat), torch.zeros_like(flat), torch.zeros_like(flat)
    weights, biases = problem.split(flat)
    theirs = [torch.nn.Parameter(w.cpu().double().clone()) for w in weights]
    their_biases = [torch.nn.Parameter(b.cpu().double().clone()) for b in biases]
    adamw = torch.optim.AdamW(
        [{"params": theirs, "weight_decay": 0.1}, {"params": their_biases, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.999),
    )  # fmt: skip
    counts = torch.zeros(2, len(theirs), device=device)
    powers = torch.ones(2, 2, len(theirs), dtype=FP64, device=device)
    for step in range(steps):
        touched = torch.tensor([1, step % 2, step > 2, 0], dtype=torch.int32)
        lr = 1e-2 / (step + 1)
        gradient.copy_(torch.randn(gradient.shape, generator=draw, dtype=FP64))
        own = problem.split(gradient.cpu().double())
        for i, has in enumerate(touched.tolist()):
            for p, parts in zip((theirs[i], their_biases[i]), own, strict=True):
                p.grad = parts[i].clone() if has else None
        for group, rate in zip(adamw.param_groups, (lr, lr / 2), strict=True):
            group["lr"] = rate
        adamw.step()
        problem.touched.copy_(touched)
        update_heads(
            flat, gradient, m, v, problem.table, problem.touched, counts, powers,
            torch.tensor([lr, lr / 2], dtype=dtype, device=device), (0.1, 0.0), (0.9, 0.999), 1e-8,
        )  # fmt: skip
        assert not problem.touched.any()
    assert counts.tolist() == 2 * [[steps, steps // 2, steps - 3, 0]]
    bound = steps * (20 * 1e-2 + 2 * 4) * ROUNDING[dtype]
    for i in range(len(theirs)):
        for p, found in ((theirs[i], weights[i]), (their_biases[i], biases[i])):
            torch.testing.assert_close(found.cpu().double(), p.detach(), rtol=0, atol=bound)
