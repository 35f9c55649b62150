"""Hub-Pathway in about a page of plain PyTorch: the truth that everything else is tested against.

Written to be read beside the paper (Shu et al., NeurIPS 2022): a loop over the experts, each on
its own samples by a boolean mask, and the full concatenation. It imports nothing of the project,
is as slow as it looks, and runs in whatever precision its inputs have (the tests use float64).

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, C outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReferenceRouting(NamedTuple):
    weights: Tensor  # [N, K], largest first
    mean: Tensor  # [M], mean of p over the batch
    experts: Tensor  # [N, K] int64
    offsets: Tensor  # [M+1] int32, rows of expert i are offsets[i]:offsets[i+1]
    rows: Tensor  # [R] int32, the flat slot n*K + j of each row, by expert, then by sample
    positions: Tensor  # [N, K] int32, the inverse: slot -> row

    @property
    def num_samples(self) -> int:
        return self.experts.shape[0]

    @property
    def num_experts(self) -> int:
        return self.mean.shape[0]

    @property
    def k(self) -> int:
        return self.experts.shape[1]

    def counts(self) -> list[int]:
        return self.offsets.diff().tolist()


class ReferenceOutput(NamedTuple):
    prediction: Tensor  # [N, C, ...]
    expert_outputs: Tensor  # [R, C, ...], rows by expert, then by sample
    routing: ReferenceRouting


def noisy_topk(clean, noise, k, eps=None, renormalize=False) -> ReferenceRouting:
    """Equations 1 and 3: noisy softmax over all M experts, then the K largest probabilities."""
    dtype = torch.float64 if clean.dtype == torch.float64 else torch.float32
    clean, noise = clean.to(dtype), noise.to(dtype)
    z = clean if eps is None else clean + eps.to(dtype) * F.softplus(noise)
    p = torch.softmax(z, dim=1)
    # A stable sort puts the lower index first among equals, and repeats none even for NaN.
    experts = torch.sort(p.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    weights = p.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)

    groups = [(experts.flatten() == i).nonzero().flatten() for i in range(p.shape[1])]
    rows = torch.cat(groups)
    positions = torch.empty_like(rows)
    positions[rows] = torch.arange(len(rows), device=rows.device)
    sizes = torch.tensor([0, *map(len, groups)], device=rows.device)
    return ReferenceRouting(
        weights, p.mean(dim=0), experts, sizes.cumsum(0).int(), rows.int(),
        positions.view_as(experts).int(),
    )  # fmt: skip


class ReferenceHubPathway(nn.Module):
    """The model: ``x -> A(concat_i(w_i * expert_i(x)))`` with zeros where an expert is inactive.

    ``forward(x, eps)`` takes the noise so that two implementations can share one draw; without
    it, training draws ``eps ~ N(0, 1)`` and evaluation uses none.
    """

    def __init__(self, experts, generator, aggregator, k=2, min_group=2, renormalize=False):
        super().__init__()
        for i, expert in enumerate(experts):
            if any(norm.running_mean is None for norm in _batch_norms(expert)):
                raise ValueError(f"experts[{i}]: its BatchNorm keeps no running statistics")
        self.experts = nn.ModuleList(experts)
        self.generator, self.aggregator = generator, aggregator
        self.k, self.min_group, self.renormalize = k, min_group, renormalize

    def forward(self, x: Tensor, eps: Tensor | None = None):
        clean, noise = self.generator(x)
        if eps is None and self.training:
            eps = torch.randn_like(clean)
        routing = noisy_topk(clean, noise, self.k, eps, self.renormalize)

        outputs, parts = [], []
        for i, expert in enumerate(self.experts):
            active = routing.experts == i  # [N, K], at most one True in a row
            samples = active.any(dim=1)
            if not samples.any():  # not run: no gradient, no moving buffers
                parts.append(None)
                continue
            output = self._run(expert, x[samples])  # [n, C, ...]
            w = routing.weights[active].to(output.dtype).view(-1, *[1] * (output.dim() - 1))
            part = output.new_zeros(len(x), *output.shape[1:])
            part[samples] = w * output
            outputs.append(output)
            parts.append(part)
        zeros = torch.zeros_like(next(part for part in parts if part is not None))
        concat = torch.cat([zeros if part is None else part for part in parts], dim=1)
        prediction = self.aggregator(concat)
        if not self.training:
            return prediction
        return ReferenceOutput(prediction, torch.cat(outputs), routing)

    def _run(self, expert: nn.Module, x: Tensor) -> Tensor:
        """A group below ``min_group`` has no batch statistics worth having: use running ones."""
        norms = _batch_norms(expert)
        frozen = [m for m in norms if m.training and self.training and len(x) < self.min_group]
        for m in frozen:
            m.training = False
        output = expert(x)
        for m in frozen:
            m.training = True
        return output


def _batch_norms(module: nn.Module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def losses(output: ReferenceOutput, y: Tensor, explore=1.0, task_loss=None, sample_weight=None):
    """Equations 2, 4, 5 and 6: ``(total, task, explore, exploit)``, one backward pass for all.

    y: classes [N] or, as the cross-entropy takes them, their probabilities [N, C]."""
    loss = task_loss or (lambda prediction, y: F.cross_entropy(prediction, y, reduction="none"))
    routing, n = output.routing, len(y)
    w = torch.ones(n, device=y.device) if sample_weight is None else sample_weight
    task = (loss(output.prediction, y) * w).mean()
    tiny = torch.finfo(routing.mean.dtype).tiny  # keeps the gradient finite where a mean is zero
    entropy = -(routing.mean * routing.mean.clamp_min(tiny).log()).sum()
    sample = routing.rows.long() // routing.experts.shape[1]  # the sample that each row came from
    exploit = (loss(output.expert_outputs, y[sample]) * w[sample]).sum() / n
    return task - explore * entropy + exploit, task, -entropy, exploit


def router_loss(
    output: ReferenceOutput, y: Tensor, temperature=1.0, task_loss=None, sample_weight=None
):
    """Ours, not the paper's: the mean of KL(q || r) over the samples, to be added to the total.

    q = softmax(-l / temperature) of the losses l of a sample's K rows, taken as numbers; r its
    weights, which sum to 1 over these K. It reaches the generator only."""
    loss = task_loss or (lambda prediction, y: F.cross_entropy(prediction, y, reduction="none"))
    routing, k = output.routing, output.routing.k
    by_row = loss(output.expert_outputs, y[routing.rows.long() // k]).detach()
    q = torch.softmax(-by_row[routing.positions.long()] / temperature, dim=1)
    tiny = torch.finfo(routing.weights.dtype).tiny  # keeps log and gradient finite at a weight of 0
    log_r = (routing.weights.clamp_min(tiny) / routing.weights.sum(dim=1, keepdim=True)).log()
    divergence = (torch.xlogy(q, q) - q * log_r).sum(dim=1)
    return (divergence if sample_weight is None else divergence * sample_weight).mean()
