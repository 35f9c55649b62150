"""The last steps of a game, each frame once: states are stacked when they are asked for.

Steps are counted from 0 on; step ``s`` lies in slot ``s % capacity`` until it is overwritten. A
step's frame is the newest of the state that was acted on. Its *age* is how many earlier frames of
its episode that state shows: 0 at an episode's start, at most H - 1; the rest of the state is
blank. After a truncated step comes a state that belongs to no step: its newest frame is kept
beside the ring.

Letters: B slots, H frames of a state, n steps of a window.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

GOES_ON, TERMINATED, TRUNCATED = 0, 1, 2  # what a step does to its episode
COLUMNS = {"actions": "<i8", "rewards": "<f8", "ends": "<u1", "ages": "<i8"}  # besides frames


class StepRing:
    """The last ``capacity`` steps, with frames uint8 [*frame_shape] and H = ``history``. Memory is
    taken at once, but touched only as it fills."""

    def __init__(self, capacity: int, frame_shape: tuple[int, ...], history: int) -> None:
        self.capacity, self.frame_shape, self.history = capacity, frame_shape, history
        # The system gives zeros page by page, when they are first written to.
        self._frames = np.zeros((capacity, *frame_shape), np.uint8)
        self._columns = {name: np.zeros(capacity, dtype) for name, dtype in COLUMNS.items()}
        self.actions, self.rewards, self.ends, self.ages = self._columns.values()
        self._back = np.arange(history)[::-1]  # of a state's frames, oldest first
        self.clear()

    def clear(self) -> None:
        """Forgets all steps."""
        self.count = 0  # steps appended so far, those overwritten since among them
        self._after: dict[int, np.ndarray] = {}  # by slot: the frame after a truncated step

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    @property
    def oldest(self) -> int:
        """The first step that is still stored."""
        return self.count - len(self)

    def slots(self, start: int, stop: int) -> np.ndarray:
        """Of steps start..stop-1, int64."""
        return np.arange(start, stop) % self.capacity

    def steps(self, slots: np.ndarray) -> np.ndarray:
        """What lies in slots [B] now."""
        return self.oldest + (slots - self.oldest) % self.capacity

    def append(
        self, frame: np.ndarray, action: int, reward: float, end: int, after: np.ndarray | None
    ) -> None:
        """Stores a step. end: GOES_ON, TERMINATED or TRUNCATED; after: the frame after the last."""
        slot, age = self.count % self.capacity, 0
        if self.count and self.ends[slot - 1] == GOES_ON:
            age = min(int(self.ages[slot - 1]) + 1, self.history - 1)
        self._after.pop(slot, None)
        if end == TRUNCATED:
            self._after[slot] = np.array(after)
        self._frames[slot] = frame
        self.actions[slot], self.rewards[slot] = action, reward
        self.ends[slot], self.ages[slot] = end, age
        self.count += 1

    def showing(self, step: int) -> list[int]:
        """The later steps whose states show the frame of a stored step."""
        later = range(step + 1, min(step + self.history, self.count))
        return [s for s in later if self.ages[s % self.capacity] >= s - step]

    def have_states(self, steps: np.ndarray) -> np.ndarray:
        """Whether all frames of stored steps' states are still stored, bool [B]."""
        return steps - self.ages[steps % self.capacity] >= self.oldest

    def states(self, slots: np.ndarray) -> np.ndarray:
        """uint8 [B, H, *frame_shape], the newest frame last."""
        stacks = self._frames.take((slots[:, None] - self._back) % self.capacity, axis=0)
        stacks[self._back > self.ages[slots][:, None]] = 0
        return stacks

    def windows(self, slots: np.ndarray, powers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Discounted sums of rewards float64 [B], and steps int64 [B], of the windows that begin in
        slots: n long, or as long as the episode lasts. powers: of gamma, float64 [n]."""
        window = (slots[:, None] + np.arange(len(powers))) % self.capacity
        ends = self.ends[window] != GOES_ON
        inside = ends.cumsum(1) - ends == 0  # no end before it
        terms = powers * self.rewards[window] * inside
        return terms.cumsum(1)[:, -1], inside.sum(1)  # in the order of n_step_return, bit for bit

    def states_after(self, slots: np.ndarray) -> np.ndarray:
        """The states after steps, as ``states`` gives them; blank after terminal ones."""
        ends, stacks = self.ends[slots], self.states((slots + 1) % self.capacity)
        stacks[ends == TERMINATED] = 0
        for row in np.flatnonzero(ends == TRUNCATED):
            stacks[row, :-1] = self.states(slots[row : row + 1])[0, 1:]
            stacks[row, -1] = self._after[int(slots[row])]
        return stacks

    def items(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Copies of the stored steps start..stop-1: "frames" uint8 [k, *frame_shape], ``COLUMNS``
        [k], and "after" uint8 [m, *frame_shape], the frames after the m that are truncated."""
        slots = self.slots(start, stop)
        after = [self._after[slot] for slot in slots[self.ends[slots] == TRUNCATED].tolist()]
        return {
            "frames": self._frames[slots],
            **{name: column[slots] for name, column in self._columns.items()},
            "after": np.array(after, np.uint8).reshape(-1, *self.frame_shape),
        }

    def put(self, items: Mapping[str, np.ndarray]) -> None:
        """Stores the ``items`` of the steps from the count on. ValueError, KeyError or another
        where they are not such."""
        frames, after, ages = items["frames"], items["after"], items["ages"]
        slots = self.slots(self.count, self.count + len(frames))
        truncated = np.flatnonzero(items["ends"] == TRUNCATED)
        if (
            any(len(items[name]) != len(frames) for name in COLUMNS)
            or any(array.dtype != np.uint8 for array in (frames, after))
            or any(array.shape[1:] != self.frame_shape for array in (frames, after))
            or len(after) != len(truncated)
            or not ((ages >= 0) & (ages < self.history)).all()
        ):
            first = self.count
            raise ValueError(f"steps from {first} on do not fit to each other or to this replay")
        self._frames[slots] = frames
        for name, column in self._columns.items():
            column[slots] = items[name]
        self._after |= zip(
            slots[truncated].tolist(), (frame.copy() for frame in after), strict=True
        )
        self.count += len(frames)
