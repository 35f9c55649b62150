"""The collectives on tensors that ranks use, each counted by what it is for.

Every one turns a peer that is lost into a ``RankFailure``. Rows travel as bytes, since some
backends know few number types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks, group

_counters: list[Counter[str]] = []


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that this rank hands over within, by what for: of rows what goes to other ranks, of
    sums and of counts what this rank adds to them (how often that travels is the backend's)."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def exchange_rows(
    rows: Tensor, send: Sequence[int], receive: Sequence[int], ranks: Ranks, what: str
) -> Tensor:
    """Rows [sum(send), ...], in the order of the replica's ranks, to those; what they sent.

    send: how many go to each rank of the replica. receive: how many come from each. Returns
    [sum(receive), ...], in the order of the senders.
    """
    shape = rows.shape[1:]
    width = shape.numel() * rows.element_size()
    _count(what, (sum(send) - send[ranks.ep_rank]) * width)
    flat = rows.contiguous().reshape(len(rows), shape.numel()).view(torch.uint8)
    got = flat.new_empty(sum(receive), width)
    with ranks.lost_peers():
        dist.all_to_all_single(got, flat, list(receive), list(send), group=group(ranks, "ep"))
    return got.view(rows.dtype).reshape(len(got), *shape)


def gather_numbers(values: Tensor, ranks: Ranks, what: str, over: str = "ep") -> Tensor:
    """[ranks, n]: the numbers [n] of each rank of a group ("world", "ep" or "dp")."""
    members = _members(ranks, over)
    _count(what, values.numel() * values.element_size() * (members - 1))
    got = values.new_empty(members, len(values))
    with ranks.lost_peers():
        dist.all_gather(list(got.unbind()), values.contiguous(), group=group(ranks, over))
    return got


def sum_over(values: Tensor, ranks: Ranks, what: str, over: str = "world") -> Tensor:
    """The sum over the ranks of a group ("world", "ep" or "dp"), in place; returned, too."""
    return _reduce(values, dist.ReduceOp.SUM, ranks, what, over)


def largest_over(values: Tensor, ranks: Ranks, what: str, over: str = "world") -> Tensor:
    """Likewise the largest value."""
    return _reduce(values, dist.ReduceOp.MAX, ranks, what, over)


def _reduce(values: Tensor, how: dist.ReduceOp, ranks: Ranks, what: str, over: str) -> Tensor:
    if _members(ranks, over) > 1:
        _count(what, values.numel() * values.element_size())
        with ranks.lost_peers():
            dist.all_reduce(values, how, group=group(ranks, over))
    return values


def _members(ranks: Ranks, over: str) -> int:
    return {"world": ranks.world, "ep": ranks.ep, "dp": ranks.dp}[over]


class _MeanOverBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean: Tensor, samples: int, ranks: Ranks) -> Tensor:
        both = torch.cat([mean * samples, mean.new_tensor([samples])])
        total = sum_over(both, ranks, "mean weights")
        ctx.ranks, ctx.share = ranks, samples / total[-1]
        return total[:-1] / total[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return sum_over(grad.clone(), ctx.ranks, "mean weights") * ctx.share, None, None


def mean_over_batch(mean: Tensor, samples: int, ranks: Ranks) -> Tensor:
    """The mean [M] over the samples of all ranks, of each rank's mean over its own ``samples``.

    Differentiable: what every rank's loss says of it reaches this rank's part.
    """
    return mean if ranks.single else _MeanOverBatch.apply(mean, samples, ranks)


def _count(what: str, size: int) -> None:
    for counter in _counters:
        counter[what] += size
