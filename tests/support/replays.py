"""Replays of random episodes, and a list of all steps ever added to look windows up in."""

from __future__ import annotations

import random

import numpy as np
import torch

from hubpath_fast.tasks.atari import PrioritizedReplay

SHAPE = (2, 3)


class Steps:
    """All steps of random episodes. ends: the probability of a step to be terminal, and to be
    truncated."""

    def __init__(self, seed: int, ends: tuple[float, float]) -> None:
        self.random, self.ends = random.Random(seed), ends
        self.frames, self.actions, self.rewards = [], [], []
        self.terminated, self.truncated, self.after = [], [], []

    def add_to(self, replay: PrioritizedReplay) -> None:
        draw, step = self.random, len(self.frames)
        terminated, truncated = (draw.random() < share for share in self.ends)
        # No frame is blank, or another's.
        self.frames.append(np.full(SHAPE, 1 + step % 255, np.uint8))
        self.after.append(np.full(SHAPE, 255 - step % 255, np.uint8))
        self.actions.append(draw.randrange(18))
        self.rewards.append(draw.choice([-1.0, 0.0, 0.3, 1.0]))
        self.terminated.append(terminated)
        self.truncated.append(truncated)
        after = self.after[-1] if truncated or draw.random() < 0.5 else None
        replay.add(
            self.frames[-1], self.actions[-1], self.rewards[-1], terminated, truncated, after
        )

    def ended(self, step: int) -> bool:
        return self.terminated[step] or self.truncated[step]

    def shown(self, step: int, history: int) -> list[int]:
        """The steps whose frames a state shows, the newest first."""
        found = [step]
        while len(found) < history and found[-1] > 0 and not self.ended(found[-1] - 1):
            found.append(found[-1] - 1)
        return found

    def stack(self, frames: list[np.ndarray], history: int) -> np.ndarray:
        blank = [np.zeros(SHAPE, np.uint8)] * (history - len(frames))
        return np.stack(blank + frames[::-1])

    def window(self, step: int, replay: PrioritizedReplay) -> tuple | None:
        """state, action, return, discount, next state of the window that begins with a step, in
        plain loops; None where something of it is not stored."""
        count, history, n = len(self.frames), replay.history, replay.n_step
        shown = self.shown(step, history)
        if shown[-1] < count - replay.capacity:
            return None
        total, last = 0.0, step
        for k in range(n):
            last = step + k
            if last >= count:
                return None
            total += replay.gamma**k * self.rewards[last]
            if self.ended(last):
                break
        steps = last - step + 1
        state = self.stack([self.frames[s] for s in shown], history)
        if self.terminated[last]:
            discount, after = 0.0, np.zeros((history, *SHAPE), np.uint8)
        elif self.truncated[last]:
            frames = [self.after[last], *(self.frames[s] for s in self.shown(last, history))]
            discount, after = replay.gamma**steps, self.stack(frames[:history], history)
        elif last + 1 >= count:
            return None
        else:
            frames = [self.frames[s] for s in self.shown(last + 1, history)]
            discount, after = replay.gamma**steps, self.stack(frames, history)
        return state, self.actions[step], total, discount, after


def filled(count: int = 60, seed: int = 1, **options) -> tuple[PrioritizedReplay, Steps]:
    """A replay with random priorities, some of them 0."""
    replay = PrioritizedReplay(**{"capacity": 40, "frame_shape": SHAPE, "n_step": 3} | options)
    steps = Steps(seed, (0.1, 0.1))
    for _ in range(count):
        steps.add_to(replay)
    draw = np.random.default_rng(seed)
    losses = draw.choice([0.0, 0.3, 1.7, 4.0, 20.0], len(replay))
    replay.update(torch.arange(len(replay)), torch.from_numpy(losses))
    return replay, steps
