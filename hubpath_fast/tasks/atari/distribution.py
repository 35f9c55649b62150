"""Distributions of returns over fixed atoms (Bellemare et al., "A Distributional Perspective on
Reinforcement Learning", ICML 2017: C51) and the double-Q target of Rainbow.

    z_i = v_min + i D,    D = (v_max - v_min) / (Z - 1)            the atoms
    m_j = sum_i p_i max(0, 1 - |clamp(R + g z_i, v_min, v_max) - z_j| / D)

m is the projection of the distribution of R + g z, z ~ p, back onto the atoms: a value's
probability goes to its two neighbours by distance, all of it to the atom that it falls on.

Letters: N states, A actions, Z atoms, R the rewards' discounted sum, g what the value after them is
multiplied by: gamma ** steps, or 0 after a terminal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def make_atoms(
    num_atoms: int, v_min: float, v_max: float, device=None, dtype: torch.dtype | None = None
) -> Tensor:
    """[Z]: the atoms, equally spaced from v_min to v_max, computed in float64.

    Raises:
        ValueError: fewer than two atoms, or a range that is empty or not finite.
    """
    if num_atoms < 2:
        raise ValueError(f"num_atoms: expected at least 2, got {num_atoms}")
    if not -math.inf < v_min < v_max < math.inf:
        raise ValueError(
            f"v_min, v_max: expected two finite numbers in order, got {v_min}, {v_max}"
        )
    atoms = torch.linspace(v_min, v_max, num_atoms, device=device, dtype=torch.float64)
    return atoms.to(dtype or torch.get_default_dtype())


def expected_values(logits: Tensor, atoms: Tensor) -> Tensor:
    """[..., Z] logits and atoms [Z] -> [...]: the mean of each distribution.

    Equal logits give equal values to the bit, whatever their place: a sum of each row, since a
    product with a vector may add up rows in different orders.
    """
    return (logits.softmax(dim=-1) * atoms).sum(dim=-1)


def greedy_actions(values: Tensor) -> Tensor:
    """[N, A] -> [N] int64: the action of highest value, the first among equals on any device."""
    count = values.shape[1]
    best = values == values.amax(dim=1, keepdim=True)
    places = torch.arange(count, device=values.device)
    # Where a value is NaN nothing is best; the losses will say so, not an index out of range.
    return torch.where(best, places, count - 1).amin(dim=1)


@torch.no_grad()
def categorical_projection(
    probabilities: Tensor, returns: Tensor, discounts: Tensor, v_min: float, v_max: float
) -> Tensor:
    """The distribution of ``returns + discounts * z`` on the atoms.

    Args:
        probabilities: [N, Z] of a float dtype, z's distribution.
        returns, discounts: [N]: R and g above.
        v_min, v_max: the first and the last atom; values beyond count as these.

    Returns:
        [N, Z] of the same dtype, without a gradient. Places between atoms are computed in float64.

    Raises:
        ValueError: other shapes or dtypes, fewer than two atoms, or an empty range.
    """
    _check_probabilities(probabilities)
    count, (n, z) = probabilities.shape[1] - 1, probabilities.shape
    _check_vectors(n, returns=returns, discounts=discounts)
    atoms = make_atoms(z, v_min, v_max, probabilities.device, torch.float64)
    values = returns.double()[:, None] + discounts.double()[:, None] * atoms
    places = ((values - v_min) * (count / (v_max - v_min))).clamp_(0, count)
    below = places.floor()
    # Whole numbers and the fraction apart, so that float32 keeps all digits of the fraction. No
    # scatter: on a GPU its additions come in any order, and a run would not repeat.
    dtype = probabilities.dtype
    distance = below.to(dtype)[:, :, None] - torch.arange(z, device=atoms.device, dtype=dtype)
    distance += (places - below).to(dtype)[:, :, None]
    shares = distance.abs_().neg_().add_(1).clamp_(min=0)  # [N, Z of values, Z of atoms]
    return torch.bmm(probabilities[:, None], shares)[:, 0]


@torch.no_grad()
def double_q_target(
    online_logits: Tensor, target_logits: Tensor, returns: Tensor, discounts: Tensor,
    v_min: float, v_max: float,
) -> Tensor:  # fmt: skip
    """The target of an update: the next state's distribution, by the target network, of the action
    that the online network takes there, projected.

    Args:
        online_logits, target_logits: [N, A, Z] of the states after the rewards.
        returns, discounts, v_min, v_max: as of ``categorical_projection``.

    Returns:
        [N, Z] in target_logits' dtype, float32 at least, without a gradient. Among actions of equal
        value the first is taken.

    Raises:
        ValueError: as of ``categorical_projection``.
    """
    _check_logits("online_logits", online_logits)
    _check_logits("target_logits", target_logits)
    if online_logits.shape != target_logits.shape:
        raise ValueError(
            f"target_logits: expected {list(online_logits.shape)} as online_logits, got "
            f"{list(target_logits.shape)}"
        )
    atoms = make_atoms(
        online_logits.shape[2], v_min, v_max, online_logits.device, _at_least_float32(online_logits)
    )
    actions = greedy_actions(expected_values(online_logits, atoms))
    chosen = _of_actions(target_logits, actions)
    probabilities = chosen.to(_at_least_float32(chosen)).softmax(dim=1)
    return categorical_projection(probabilities, returns, discounts, v_min, v_max)


def categorical_loss(logits: Tensor, actions: Tensor, target: Tensor) -> Tensor:
    """[N]: the cross-entropy in nats of the actions' distributions against the target.

    Args:
        logits: [N, A, Z]. actions: [N] int64, what was done. target: [N, Z] of probabilities, no
            gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit; actions out of range, which are looked at on
            the CPU, where that costs no wait.
    """
    _check_logits("logits", logits)
    n, count, z = logits.shape
    if actions.dtype != torch.int64 or list(actions.shape) != [n]:
        raise ValueError(
            f"actions: expected int64 [{n}] as logits, got {actions.dtype} {list(actions.shape)}"
        )
    if list(target.shape) != [n, z] or not target.is_floating_point():
        raise ValueError(
            f"target: expected probabilities [{n}, {z}] as logits, got "
            f"{target.dtype} {list(target.shape)}"
        )
    if n and actions.device.type == "cpu":
        low, high = actions.aminmax()
        if low < 0 or high >= count:
            wrong = int(low if low < 0 else high)
            raise ValueError(f"actions: expected 0..{count - 1} of {count} actions, got {wrong}")
    chosen = _of_actions(logits, actions)
    chosen = chosen.to(_at_least_float32(chosen))
    return -(target.detach() * chosen.log_softmax(dim=1)).sum(dim=1)


def _of_actions(logits: Tensor, actions: Tensor) -> Tensor:
    """[N, A, Z] and [N] -> [N, Z]."""
    index = actions[:, None, None].expand(-1, 1, logits.shape[2])
    return logits.gather(1, index)[:, 0]


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_probabilities(probabilities: Tensor) -> None:
    if probabilities.dim() != 2 or not probabilities.is_floating_point():
        raise ValueError(
            "probabilities: expected floats [N, Z], got "
            f"{probabilities.dtype} {list(probabilities.shape)}"
        )


def _check_logits(name: str, logits: Tensor) -> None:
    if logits.dim() != 3 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(
            f"{name}: expected floats [N, A, Z], got {logits.dtype} {list(logits.shape)}"
        )


def _check_vectors(n: int, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        if list(vector.shape) != [n]:
            raise ValueError(f"{name}: expected [{n}], one a state, got {list(vector.shape)}")
