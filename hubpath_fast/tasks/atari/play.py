"""Playing whole games with a policy, or with actions drawn at random.

As Data-Efficient Rainbow is evaluated: no noise, the action of the largest expected return, except
that one in a thousand is drawn at random; raw scores of whole games, over all lives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...devices import eval_mode
from .distribution import expected_values, greedy_actions
from .policy import Policy

EPSILON = 0.001


@dataclass(frozen=True)
class Episode:
    """A game that was played. score: raw, the sum of its rewards; truncated: stopped by the
    environment's limit of steps, not over."""

    score: float
    steps: int
    truncated: bool


class Moment(NamedTuple):
    """One step, for who looks on. states: that the policy was asked about, [1, H, h, w] on its
    device; logits: its answer [A, Z]. Both are None for random play."""

    episode: int
    step: int  # of the episode, from 0
    screen: np.ndarray  # before the action, uint8 [h, w, 3]
    action: int
    reward: float
    score: float  # with this reward
    info: dict[str, Any]
    states: Tensor | None
    logits: Tensor | None


@torch.no_grad()
def play_episodes(
    policy: Policy | None,
    env: Any,
    episodes: int,
    generator: torch.Generator,
    epsilon: float = EPSILON,
    on_step: Callable[[Moment], None] | None = None,
    check: Callable[[], None] | None = None,
) -> list[Episode]:
    """Plays so many games, one after the other.

    Args:
        policy: runs in evaluation mode, without gradients; each of its modules is in its own mode
            again afterwards. None: every action is drawn, each as likely as the others.
        env: an environment in which lost lives clear no frames (``training=False``); a lost life
            ends no game here in any case.
        generator: of the random actions, on the CPU. The games' own draws are the environment's.
        epsilon: share of actions that are drawn.
        on_step: is shown each step.
        check: is called before each step; what it raises ends the playing.

    Raises ValueError for wrong numbers, and for a policy of another game's actions.
    """
    _check(policy, env, episodes, epsilon)
    with contextlib.nullcontext() if policy is None else eval_mode(policy):
        return [
            _play(policy, env, episode, generator, epsilon, on_step, check)
            for episode in range(episodes)
        ]


def _play(
    policy: Policy | None,
    env: Any,
    episode: int,
    generator: torch.Generator,
    epsilon: float,
    on_step: Callable[[Moment], None] | None,
    check: Callable[[], None] | None,
) -> Episode:
    device = None if policy is None else policy.atoms.device
    obs, _ = env.reset()
    score, steps = 0.0, 0
    while True:
        if check is not None:
            check()
        states, logits, action = None, None, None
        drawn = policy is None or float(torch.rand((), generator=generator)) < epsilon
        if not drawn or (policy is not None and on_step is not None):  # who looks on sees it asked
            states = torch.from_numpy(np.ascontiguousarray(obs))[None].to(device)
            logits = policy(states)
            action = int(greedy_actions(expected_values(logits, policy.atoms)))
        if drawn:
            action = int(torch.randint(env.num_actions, (), generator=generator))
        screen = None if on_step is None else env.render()
        obs, reward, terminated, truncated, info = env.step(action)
        score, steps = score + float(reward), steps + 1
        if on_step is not None:
            answer = None if logits is None else logits[0]
            on_step(
                Moment(
                    episode, steps - 1, screen, action, float(reward), score, info, states, answer
                )
            )  # fmt: skip
        if terminated or truncated:
            return Episode(score, steps, truncated and not terminated)


def _check(policy: Policy | None, env: Any, episodes: int, epsilon: float) -> None:
    if isinstance(episodes, bool) or not isinstance(episodes, int) or episodes < 1:
        raise ValueError(f"episodes: expected an integer of at least 1, got {episodes!r}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon: expected a share in 0..1, got {epsilon!r}")
    if policy is not None and policy.num_actions != env.num_actions:
        raise ValueError(
            f"policy: expected one for the game's {env.num_actions} actions, got one for "
            f"{policy.num_actions}; it is of another game"
        )
