"""The n-step return of one window of steps, in plain floats.

    return = sum over k < steps of gamma**k * r[start + k],   bootstrapped by gamma**steps

A window ends after n steps or at an episode's end, whichever comes first: what follows belongs to
another episode. ``PrioritizedReplay.sample`` computes the same for a batch at once.
"""

from __future__ import annotations

from collections.abc import Sequence


def n_step_return(
    rewards: Sequence[float],
    terminated: Sequence[bool],
    truncated: Sequence[bool],
    start: int,
    n: int,
    gamma: float,
) -> tuple[float, float, int]:
    """The return of the window that begins with step ``start``.

    Args:
        rewards, terminated, truncated: of each stored step, oldest first.
        n: the most steps of a window.
        gamma: the discount of a step, in [0, 1].

    Returns:
        (return, discount, steps): the discounted sum of ``steps`` rewards, and what the value of
        the state after them counts: ``gamma**steps``, or 0 where the last step is terminal. A
        truncated step ends the window, too, but the state after it is bootstrapped from.

    Raises:
        ValueError: fewer than n steps are stored from ``start`` on and no episode ends among them;
            lists of different lengths; a start that is not stored; n or gamma out of range.
    """
    stored = len(rewards)
    if len(terminated) != stored or len(truncated) != stored:
        raise ValueError(
            f"terminated, truncated: expected one flag for each of {stored} rewards, got "
            f"{len(terminated)} and {len(truncated)}"
        )
    if n < 1:
        raise ValueError(f"n: expected at least 1 step, got {n}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: expected a number in 0..1, got {gamma}")
    if not 0 <= start < stored:
        raise ValueError(f"start: expected a stored step in 0..{stored - 1}, got {start}")
    total = 0.0
    for k in range(min(n, stored - start)):
        total += gamma**k * float(rewards[start + k])
        if terminated[start + k]:
            return total, 0.0, k + 1
        if truncated[start + k] or k + 1 == n:
            return total, float(gamma ** (k + 1)), k + 1
    raise ValueError(
        f"n: expected {n} steps from step {start} on or an episode's end among them, got "
        f"{stored - start} steps without one; wait until more are stored"
    )
