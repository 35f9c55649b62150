"""Prioritised replay of n-step windows, each frame stored once (Schaul et al. 2016; Rainbow).

    P(i) = p_i / sum_j p_j,   p_i = loss_i**exponent,   weight_i = (N P(i))**-beta / max in batch

A window ends after n steps or at an episode's end, and its return bootstraps from the state after
it, unless that step was terminal. A step can be drawn where all that it needs is stored: the frames
of its state, its window, and the state after that. Any other has mass 0 in the tree, whatever its
priority: the newest, until n steps more are there or the episode ends; and those whose state shows
a frame that was overwritten.

Letters: B windows of a batch, H frames of a state, n steps of a window.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ring import GOES_ON, TERMINATED, TRUNCATED, StepRing
from .tree import SumTree

STATE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True)
class ReplayBatch:
    """B windows, as tensors on the CPU.

    indices int64 [B] slots, for ``update``; states and next_states uint8 [B, H, *frame_shape];
    actions int64 [B]; returns, discounts, weights float32 [B]. discounts: ``gamma**steps``; 0 after
    a terminal step, where next_states are blank.
    """

    indices: Tensor
    states: Tensor
    actions: Tensor
    returns: Tensor
    discounts: Tensor
    next_states: Tensor
    weights: Tensor


class PrioritizedReplay:
    """The last ``capacity`` steps. Memory is taken at once, but touched only as it fills.

    Args:
        capacity: steps that are kept.
        frame_shape: of a frame, uint8.
        history: H, frames of a state.
        n_step: n, the most steps of a window.
        gamma: the discount of a step.
        exponent: priorities are ``loss**exponent``.

    Attributes:
        lineage: an object that stays the same as long as steps are only added.
    """

    def __init__(
        self,
        capacity: int,
        frame_shape: Sequence[int] = (84, 84),
        history: int = 4,
        n_step: int = 20,
        gamma: float = 0.99,
        exponent: float = 0.5,
    ) -> None:
        self.capacity = _whole("capacity", capacity)
        self.frame_shape = tuple(_whole("frame_shape", size) for size in frame_shape)
        self.history, self.n_step = _whole("history", history), _whole("n_step", n_step)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: expected a number in 0..1, got {gamma}")
        if not 0 <= exponent < math.inf:
            raise ValueError(f"exponent: expected a finite number, at least 0, got {exponent}")
        self.gamma, self.exponent = float(gamma), float(exponent)
        self._powers = np.array([self.gamma**k for k in range(self.n_step + 1)])
        try:
            self._ring = StepRing(self.capacity, self.frame_shape, self.history)
            self._priorities = np.zeros(self.capacity)
            self._tree = SumTree(self.capacity)
        except (MemoryError, ValueError) as error:
            size = self.capacity * math.prod(self.frame_shape) / 2**30
            raise ValueError(
                f"capacity: {self.capacity} frames of {list(self.frame_shape)} take {size:.1f} "
                "GiB, more than this machine gives; take a smaller one"
            ) from error
        self.clear()

    def clear(self) -> None:
        """Forgets all steps and priorities."""
        self.lineage = object()  # what is added to it is one history
        self._ring.clear()
        self._open = 0  # the first step whose window is not yet stored whole
        self._highest = 1.0  # priority so far: that of new steps
        self._tree.set_all(np.zeros(self.capacity))

    def __len__(self) -> int:
        """Steps that are stored, whether they can be drawn or not."""
        return len(self._ring)

    @property
    def count(self) -> int:
        """Steps added so far, those overwritten since among them."""
        return self._ring.count

    @property
    def oldest(self) -> int:
        """The first step that is still stored, counted from 0 on."""
        return self._ring.oldest

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            "capacity": self.capacity,
            "frame_shape": list(self.frame_shape),
            "history": self.history,
            "n_step": self.n_step,
            "gamma": self.gamma,
            "exponent": self.exponent,
        }

    def add(
        self,
        frame: np.ndarray | Tensor,
        action: int,
        reward: float,
        terminated: bool,
        truncated: bool,
        next_frame: np.ndarray | Tensor | None = None,
    ) -> None:
        """Stores a step, in place of the oldest where the replay is full.

        Args:
            frame: uint8 [*frame_shape], the newest of the state that was acted on.
            reward: of the step, as it is to be learnt from (clipped).
            terminated, truncated: whether the episode ends with it. The next step then begins
                another one, whose states show nothing of this one. Both: it is terminal.
            next_frame: the newest of the state after it; needed (and kept) only for a truncated
                step.

        Raises:
            ValueError: a frame of another shape or dtype; a truncated step without next_frame; a
                reward that is not finite. Nothing is stored then.
        """
        frame = self._checked("frame", frame)
        action, reward = int(action), float(reward)
        if not math.isfinite(reward):
            raise ValueError(f"reward: expected a finite number, got {reward}")
        end = TERMINATED if terminated else TRUNCATED if truncated else GOES_ON
        if end == TRUNCATED:
            if next_frame is None:
                raise ValueError(
                    "next_frame: expected the frame after a truncated step, which its return "
                    "bootstraps from, got None"
                )
            next_frame = self._checked("next_frame", next_frame)
        step, changed = self.count, []
        if step >= self.capacity:  # the oldest goes, and with it the states that show its frame
            changed = [step, *self._ring.showing(self.oldest)]
        self._ring.append(frame, action, reward, end, next_frame)
        self._priorities[step % self.capacity] = self._highest
        known = max(self._open, self.oldest)
        if end != GOES_ON:
            self._open = step + 1
        elif step - self._open >= self.n_step:
            self._open += 1
        changed += range(known, self._open)
        if changed:
            steps = np.array(changed)
            self._tree.set(steps % self.capacity, self._masses(steps))

    def probabilities(self) -> Tensor:
        """The probability of each slot to be drawn, float64 [capacity]: 0 where none can be."""
        return torch.from_numpy(self._tree.masses / (self._tree.total or 1.0))

    def sample(self, batch: int, beta: float, generator: torch.Generator) -> ReplayBatch:
        """Draws windows: one from each of ``batch`` equal parts of the line of all priorities.

        Args:
            beta: how far the weights correct for the probabilities: not at 0, wholly at 1.
            generator: of the CPU.

        Raises:
            ValueError: no window can be drawn yet; batch or beta out of range.
        """
        batch = _whole("batch", batch)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: expected a number in 0..1, got {beta}")
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise ValueError(f"generator: expected a torch.Generator of the CPU, got {generator!r}")
        total = self._tree.total
        if not total > 0:
            raise ValueError(
                f"replay: no window of its {len(self)} steps can be drawn: that takes n_step = "
                f"{self.n_step} steps and one after them, or an episode's end, and a priority "
                "above 0; add more steps first"
            )
        drawn = torch.rand(batch, generator=generator, dtype=torch.float64).numpy()
        slots = self._tree.draw((np.arange(batch) + drawn) * (total / batch))
        returns, steps = self._ring.windows(slots, self._powers[:-1])
        last = (slots + steps - 1) % self.capacity
        terminal = self._ring.ends[last] == TERMINATED
        discounts = np.where(terminal, 0.0, self._powers[steps])
        masses = self._tree.masses[slots]
        weights = (masses / masses.min()) ** -float(beta)  # N and the total cancel
        return ReplayBatch(
            indices=torch.from_numpy(slots),
            states=torch.from_numpy(self._ring.states(slots)),
            actions=torch.from_numpy(self._ring.actions[slots]),
            returns=torch.from_numpy(returns.astype(np.float32)),
            discounts=torch.from_numpy(discounts.astype(np.float32)),
            next_states=torch.from_numpy(self._ring.states_after(last)),
            weights=torch.from_numpy(weights.astype(np.float32)),
        )

    def update(self, indices: Tensor, losses: Tensor) -> None:
        """Gives drawn windows the priorities ``losses**exponent``.

        A slot that can no longer be drawn (overwritten since) keeps what it has. Of equal indices
        the last counts.

        Args:
            indices: int64 [B], slots as drawn.
            losses: [B], finite and not negative, on any device.

        Raises:
            ValueError: before any priority is written.
        """
        slots, losses = _array(indices), _array(losses)
        if slots.dtype.kind not in "iu" or slots.ndim != 1:
            raise ValueError(f"indices: expected int64 [B], got {slots.dtype} {list(slots.shape)}")
        if losses.shape != slots.shape:
            raise ValueError(
                f"losses: expected one for each of {len(slots)} indices, got {list(losses.shape)}"
            )
        wrong = (slots < 0) | (slots >= len(self))
        if wrong.any():
            raise ValueError(f"indices: expected slots below {len(self)}, got {slots[wrong][0]}")
        losses = losses.astype(np.float64)
        priorities = np.where(losses >= 0, losses, np.nan) ** self.exponent
        wrong = ~(np.isfinite(losses) & np.isfinite(priorities))
        if wrong.any():
            raise ValueError(
                f"losses: expected finite numbers, none negative, got {losses[wrong][0]} for "
                f"index {slots[wrong][0]}; no priority was changed"
            )
        slots = slots.astype(np.int64)
        known = self._drawable(self._ring.steps(slots))
        slots, priorities = slots[known], priorities[known]
        if len(slots):
            self._priorities[slots] = priorities
            self._highest = max(self._highest, float(priorities.max()))
            self._tree.set(slots, self._priorities[slots])

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain types and tensors: ``small_state`` and the ``items`` stored."""
        items = self.items(self.oldest, self.count)
        return {
            **self.small_state(),
            "items": {name: torch.from_numpy(values) for name, values in items.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes this replay equal to the saved one, to the bit.

        Raises:
            ValueError: the state is damaged, or of a replay with other settings. This one is empty
                then.
        """
        try:
            items = {name: values.numpy() for name, values in state["items"].items()}
        except STATE_ERRORS as error:
            self.clear()
            raise _damaged(error) from error
        self.restore(state, [items])

    def small_state(self) -> dict[str, Any]:
        """All but the steps: settings, counters, and the priorities float64 of the stored steps,
        oldest first. These change; a step that is stored does not."""
        return {
            "settings": self.settings(),
            "count": self.count,
            "open": self._open,
            "highest": self._highest,
            "priorities": torch.from_numpy(
                self._priorities[self._ring.slots(self.oldest, self.count)]
            ),
        }

    def items(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Copies of the stored steps start..stop-1, see ``StepRing.items``."""
        return self._ring.items(start, stop)

    def restore(self, state: Mapping[str, Any], parts: Iterable[Mapping[str, np.ndarray]]) -> None:
        """``load_state_dict`` from a ``small_state`` and the ``items`` of consecutive steps, from
        the oldest that is stored on. What making the parts raises is passed on."""
        self.clear()
        try:
            saved, count = dict(state["settings"]), state["count"]
            priorities = state["priorities"].numpy()
            if priorities.dtype != np.float64 or len(priorities) != min(count, self.capacity):
                raise ValueError("its priorities are not those of its steps")
            if not (np.isfinite(priorities) & (priorities >= 0)).all():
                raise ValueError("some of its priorities are negative or not finite")
            if not (0 <= state["open"] <= count and 1 <= state["highest"] < math.inf):
                raise ValueError("its counters are out of range")
        except STATE_ERRORS as error:
            raise _damaged(error) from error
        for name, own in self.settings().items():
            if saved.get(name) != own:
                raise ValueError(
                    f"{name}: the saved replay has {saved.get(name)}, this one {own}; make it with "
                    "the same settings"
                )
        try:
            self._put(count, parts)
        except BaseException:
            self.clear()
            raise
        self._open, self._highest = int(state["open"]), float(state["highest"])
        steps, masses = np.arange(self.oldest, count), np.zeros(self.capacity)
        slots = steps % self.capacity
        self._priorities[slots] = priorities
        masses[slots] = self._masses(steps)
        self._tree.set_all(masses)

    def _put(self, count: int, parts: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Fills the empty ring with the items of the last steps before ``count``."""
        self._ring.count = max(0, count - self.capacity)
        for items in parts:
            try:
                self._ring.put(items)
            except STATE_ERRORS as error:
                raise _damaged(error) from error
        if self.count != count:
            raise _damaged(f"it has steps up to {self.count} of {count}")

    def _checked(self, name: str, frame: np.ndarray | Tensor) -> np.ndarray:
        frame = _array(frame)
        if frame.dtype != np.uint8 or frame.shape != self.frame_shape:
            raise ValueError(
                f"{name}: expected uint8 {list(self.frame_shape)}, got {frame.dtype} "
                f"{list(frame.shape)}"
            )
        return frame

    def _drawable(self, steps: np.ndarray) -> np.ndarray:
        """Whether all that stored steps [B] need is stored, too."""
        return self._ring.have_states(steps) & (steps < self._open)

    def _masses(self, steps: np.ndarray) -> np.ndarray:
        return np.where(self._drawable(steps), self._priorities[steps % self.capacity], 0.0)


def _whole(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer, at least 1, got {value!r}")
    return number


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _damaged(reason: object) -> ValueError:
    if isinstance(reason, KeyError):
        reason = f"it lacks {reason}"
    return ValueError(f"state: of another version, or damaged ({reason}); restore it from a copy")
