"""Model soups: the average of fine-tuned weights (Wortsman et al., ICML 2022).

Only over equal architectures: a state is a ``state_dict()``, and all have the same names and
shapes. BatchNorm's running statistics are averaged like weights, but those averages do not fit the
averaged weights; call ``reestimate_batchnorm`` on a soup before it is used or scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..devices import eval_mode
from ..measure import Measure

State = Mapping[str, Tensor]


def uniform_soup(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of the states' floating-point tensors; of others (counters) a copy of the first's.

    The mean is taken in float64 and rounded once, to the tensor's own dtype. Raises ValueError for
    no states, and for states that differ in names, shapes or dtypes, saying where.
    """
    _check(states)
    first, *others = states
    soup = {}
    for name, tensor in first.items():
        mean = tensor.detach().clone()
        if tensor.is_floating_point():
            total = mean.double()  # of a float64 tensor this is the copy itself
            for state in others:
                total += state[name].detach().to(total)
            mean = (total / len(states)).to(tensor.dtype)
        soup[name] = mean
    return soup


def greedy_soup(
    states: Sequence[State],
    score: Callable[[dict[str, Tensor]], float],
    measure: Measure,
    scores: Sequence[float] | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """The paper's recipe 1: goes through the states from the best to the worst, and keeps each that
    does not make the soup worse.

    Args:
        states: to choose from.
        score: of a state on held-out data; it should re-estimate BatchNorm first.
        measure: what ``score`` returns; says which of two scores is better.
        scores: of the states alone; None: ``score`` of each. Among equals the state given first
            comes first.

    Returns:
        (the soup, the indices of its ingredients in the order they were added).

    Raises:
        ValueError: as ``uniform_soup``; scores of another number than states; NaN.
    """
    _check(states)
    if scores is None:
        scores = [score(uniform_soup([state])) for state in states]
    if len(scores) != len(states):
        raise ValueError(f"scores: expected {len(states)}, one for each state, got {len(scores)}")
    for i, value in enumerate(scores):
        _check_number(value, f"state {i}")
    order = measure.ranked(scores)
    chosen, best = order[:1], scores[order[0]]
    soup = uniform_soup([states[order[0]]])
    for i in order[1:]:
        trial = uniform_soup([states[j] for j in (*chosen, i)])
        reached = score(trial)
        _check_number(reached, f"the soup of states {[*chosen, i]}")
        if not measure.is_better(best, than=reached):
            chosen, best, soup = [*chosen, i], reached, trial
    return soup, chosen


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Any], num_batches: int | None = None
) -> None:
    """Sets the running statistics of all BatchNorm layers to their means over training batches.

    batches: images, or tuples that begin with images, as the model takes them; they are moved to
    its device. num_batches: at most so many, which an endless stream needs; None: all.

    None is read for a model without such layers. Raises ValueError for no batches, before anything
    is changed.

    Unlike torch's ``swa_utils.update_bn`` it leaves dropout off, and reaches the layers of experts
    whose statistics stay fixed in training: an average of weights needs new ones there too.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches: expected at least 1 or None, got {num_batches}")
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    if not layers:
        return
    iterator = islice(batches, num_batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("batches: got none to estimate BatchNorm's statistics on; give some")
    device = next(model.parameters()).device
    momenta = {layer: layer.momentum for layer in layers}
    try:
        with eval_mode(model):
            for layer in layers:
                layer.reset_running_stats()
                layer.training, layer.momentum = True, None  # None: the plain mean over all batches
            for batch in chain([first], iterator):
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                model(images.to(device))
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum


def _check(states: Sequence[State]) -> None:
    if not states:
        raise ValueError("states: got none; a soup needs at least one")
    first = states[0]
    for i, state in enumerate(states):
        for name in (*first, *state):
            if name not in first or name not in state:
                has, lacks = (0, i) if name in first else (i, 0)
                reason = f"{name} is in state {has}, not in state {lacks}"
            elif _describe(first[name]) != _describe(state[name]):
                here, there = _describe(first[name]), _describe(state[name])
                reason = f"{name} is {here} in state 0, {there} in state {i}"
            else:
                continue
            raise ValueError(f"states: soups need equal architectures, but {reason}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_number(value: float, what: str) -> None:
    if math.isnan(value):
        raise ValueError(f"score: expected a number, got NaN for {what}; it must be comparable")
