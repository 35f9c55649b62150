"""Gradients of several ranks, between backward and the update.

Each rank's loss is a mean over its own samples. The router, which every rank has, gets the mean of
all ranks' gradients; an expert that several replicas have gets the mean of theirs, but only where
any of them had rows for it in this step, and otherwise keeps no gradient, as in one process. An
expert that one rank has alone needs nothing: what reached it over ``exchange`` is right already.

Which parameters have a gradient is known on the host without waiting for a device, so ranks agree
on it there, beside the rows of each expert; sums travel in a fixed order, and no rank leaves one
out. The norm that clipping needs is one number for all ranks: were it each rank's own, the router's
copies would drift apart.

Letters: M experts, D replicas (``Ranks.dp``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .collectives import largest_over, sum_over
from .ranks import Ranks

Experts = tuple[int, ...]  # those that have a parameter; () of the router's
BUCKET_BYTES = 1 << 26  # that are copied together for one sum


class Gradients:
    """The gradients of a model that ``distribute`` has given to ranks.

    Args:
        model: parameters of its ``experts`` are theirs, all others the router's. One without
            experts has a router alone.
        ranks: of the run.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self.experts: Sequence[nn.Module] = getattr(model, "experts", ())
        self._parts = _parts(model, self.experts)
        self._router = {id(p) for p in self._parts[()]}
        # Which parameters of a part had a gradient, where all ranks that have it said the same.
        self._known: dict[Experts, tuple[bool, ...]] = {}

    def average(self, counts: Sequence[int], bad: bool = False) -> bool:
        """After backward: averages gradients, in place. Collective.

        With replicas also the running statistics of experts' BatchNorms in training mode, weighted
        by rows.

        Args:
            counts: [M] rows of each expert that this rank's samples had since the last update.
            bad: whether this rank cannot go on with its gradients.

        Returns whether that is so on any rank; then nothing is averaged.
        """
        flags = self._flags()
        changed = any(self._known.get(key) != found for key, found in flags.items())
        rows, any_bad, any_changed = self._agree(counts, bad, changed)
        if any_bad:
            return True
        used = self._exchange_flags(flags) if any_changed else self._known
        self._average(self._parts[()], used.get((), ()), "world", "router gradients")
        if self.ranks.dp > 1:
            for key, parameters in self._parts.items():
                if key and any(sum(replica[i] for i in key) for replica in rows):
                    self._average(parameters, used.get(key, ()), "dp", "expert gradients")
            self._average_statistics(rows)
        return False

    def clip(
        self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        """Scales gradients in place so that their norm over all ranks is at most ``max_norm``, as
        ``torch.nn.utils.clip_grad_norm_`` does in one process. Collective.

        Args:
            parameters: of this rank; each expert's count once, whichever rank has it.
            max_norm: infinity changes nothing.
            norm_type: p of the norm, or infinity.

        Returns the norm before, a scalar that is the same on all ranks; nothing waits for it.
        """
        parameters = [p for p in parameters if p.grad is not None and not p.is_meta]
        router = [p.grad for p in parameters if id(p) in self._router]
        experts = [p.grad for p in parameters if id(p) not in self._router]
        device = next((p.device for p in parameters), torch.device("cpu"))
        norms = [_norm(grads, norm_type, device) for grads in (router, experts)]
        if math.isinf(norm_type):
            total = self._largest(torch.stack(norms))
        else:
            powers = torch.stack(norms) ** norm_type
            # Over all ranks, not a replica's, so that no two find different last digits.
            powers[1] = sum_over(powers[1].clone(), self.ranks, "norm") / self.ranks.dp
            total = powers.sum() ** (1 / norm_type)
        if parameters:
            total = total.to(parameters[0].grad.dtype)
            nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total

    def _largest(self, norms: Tensor) -> Tensor:
        """Over all ranks, NaN where any is: a maximum alone may lose it."""
        unknown = norms.isnan()
        found = torch.stack([torch.where(unknown, math.inf, norms).max(), unknown.any().double()])
        largest, unknown = largest_over(found, self.ranks, "norm")
        return torch.where(unknown > 0, math.nan, largest)

    def _flags(self) -> dict[Experts, tuple[bool, ...]]:
        """Which parameters have a gradient: of the router, and of the experts that have any."""
        found = {}
        for key, parameters in self._parts.items():
            flags = tuple(p.grad is not None for p in parameters)
            if not key or (self.ranks.dp > 1 and any(flags)):
                found[key] = flags
        return found

    def _agree(
        self, counts: Sequence[int], bad: bool, changed: bool
    ) -> tuple[list[list[int]], bool, bool]:
        """([D][M] rows of each expert by replica, whether any rank is bad, whether any changed)."""
        table = torch.zeros(self.ranks.dp, len(self.experts), dtype=torch.int64)
        table[self.ranks.dp_rank] = torch.tensor(counts, dtype=torch.int64)
        sums = torch.cat([torch.tensor([bad, changed], dtype=torch.int64), table.flatten()])
        sum_over(sums, self.ranks, "agreement")
        return sums[2:].reshape(table.shape).tolist(), bool(sums[0]), bool(sums[1])

    def _exchange_flags(
        self, flags: dict[Experts, tuple[bool, ...]]
    ) -> dict[Experts, tuple[bool, ...]]:
        """The parameters of each part that have a gradient on any rank in this step."""
        by_part: dict[Experts, list[tuple[bool, ...]]] = {}
        for rank in self.ranks.gather(flags):
            for key, found in rank.items():
                by_part.setdefault(key, []).append(found)
        for key, found in by_part.items():
            if len(set(found)) == 1:
                self._known[key] = found[0]
            else:  # asked for anew at every step
                self._known.pop(key, None)
        union = {key: tuple(map(any, zip(*found, strict=True))) for key, found in by_part.items()}
        return self._known | union

    def _average(
        self, parameters: Sequence[nn.Parameter], used: Sequence[bool], over: str, what: str
    ) -> None:
        """The mean over the ranks of a group, of parameters that any of them has a gradient of."""
        chosen = [p for p, flag in zip(parameters, used, strict=False) if flag and not p.is_meta]
        for p in chosen:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        members = self.ranks.world if over == "world" else self.ranks.dp
        for grads in _buckets([p.grad for p in chosen]):
            _replace(grads, sum_over(_flat(grads), self.ranks, what, over).div_(members))

    def _average_statistics(self, rows: Sequence[Sequence[int]]) -> None:
        """Of the BatchNorms of experts that had rows: what other replicas have seen counts, too."""
        means, weights, numbers = [], [], []
        for index, norm in _norms(self.experts):
            total = sum(replica[index] for replica in rows)
            if total:
                own = [norm.running_mean, norm.running_var]
                means += own
                weights += [rows[self.ranks.dp_rank][index] / total] * len(own)
                numbers.append(norm.num_batches_tracked)
        for tensors in _buckets(means):
            share = {id(t): weight for t, weight in zip(means, weights, strict=True)}
            parts = _flat([t * share[id(t)] for t in tensors])
            _replace(tensors, sum_over(parts, self.ranks, "statistics", "dp"))
        for tensors in _buckets([n for n in numbers if n is not None]):
            _replace(tensors, largest_over(_flat(tensors), self.ranks, "statistics", "dp"))


def _parts(model: nn.Module, experts: Sequence[nn.Module]) -> dict[Experts, list[nn.Parameter]]:
    """The parameters that require a gradient by the experts that have them, in the model's order;
    those that the router has as well are its."""
    inside: dict[int, list[int]] = {}
    for index, expert in enumerate(experts):
        for p in expert.parameters():
            inside.setdefault(id(p), []).append(index)
    for name, child in model.named_children():
        if name != "experts":
            for p in child.parameters():
                inside.pop(id(p), None)
    parts: dict[Experts, list[nn.Parameter]] = {(): []}
    for p in model.parameters():
        if p.requires_grad:
            parts.setdefault(tuple(inside.get(id(p), ())), []).append(p)
    return parts


def _norms(experts: Sequence[nn.Module]) -> Iterator[tuple[int, _NormBase]]:
    """(expert, normalisation that gathers statistics now), each module once."""
    seen: set[int] = set()
    for index, expert in enumerate(experts):
        for module in expert.modules():
            gathers = isinstance(module, _NormBase) and module.training
            if not gathers or module.running_mean is None or module.running_mean.is_meta:
                continue
            if id(module) not in seen:
                seen.add(id(module))
                yield index, module


def _norm(grads: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return nn.utils.get_total_norm(grads, norm_type).double()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type together, in their order, up to the size of a bucket."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[Tensor] = []
        size = 0
        for tensor in (t for t in tensors if t.dtype == dtype):
            own = tensor.numel() * tensor.element_size()
            if bucket and size + own > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += own
        if bucket:
            yield bucket


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _replace(tensors: Sequence[Tensor], flat: Tensor) -> None:
    parts = flat.split([t.numel() for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
