"""At which sizes an expert's graphs are captured, and in which of them a group is replayed.

A captured graph has one size, and groups differ at every step. Two rules:

- ``SeenSizes``: a size is captured once it was seen a few times, groups of other sizes run eagerly.
  So it is where rows must not be added (exact sizes), and for predictions (padded to ``bucket``).
- ``CapacitySizes``: a few sizes that all groups are padded to, chosen from the expert's share of
  the batch. A sample comes to an expert or does not, so of N samples with a mean of m its rows have
  a standard deviation of sqrt(m (1 - m/N)): captured are the ladder's sizes around the mean. The
  largest decides how much memory the expert's graphs hold from then on, so the few groups that
  chance puts above it run eagerly, and a larger one is captured only where routing has drifted. A
  size between those that there are costs next to no memory: it is captured when the rows
  that were padded for want of it have paid for the time of a capture.

Nothing here knows of torch: counts of rows in, sizes out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection

MIN_SEEN = 3  # a capture costs several eager runs; rare sizes never earn it back
EVEN_STEP, LAST_EVEN = 4, 32  # rows
AROUND = 2.2  # standard deviations of an expert's rows: of its groups, 97 % are within
# A group above all sizes has a larger one captured where the mean of late has moved: where even so
# many deviations above it are beyond the sizes that there are. It has headroom, for routing that
# drifts on, and later serves as one of the sizes around the mean.
MOVED, HEADROOM = 1.8, 4.5
AVERAGED = 25  # steps, that the mean looks back
# A capture of a ResNet-50 takes 0.3 to 0.5 s (warm-up runs, two recordings), and a row of it some
# 0.3 ms of a training step on the same device: as much as 1,000 to 1,700 rows.
CAPTURE_ROWS = 1000
# A tenth of that within 50 steps: if routing stays where it is, 500 steps pay for the capture.
RECENT_ROWS, RECENT = 100, 50
# Groups above all sizes, likewise, that are too many for chance wherever the mean is: four within
# the 50 steps. With 48 samples for 2 of 5 experts that happens to an expert once in 800,000 steps;
# a group alone, once in 300, and its step then takes half as long again (five ResNet-50 on an H100,
# whose host is slow).
OFTEN = 3.0


def ladder_size(count: int) -> int:
    """The smallest capacity that holds ``count`` rows: 4, 8, ..., 32, then times 9/8 each."""
    if count <= LAST_EVEN:
        return max(1, -(-count // EVEN_STEP)) * EVEN_STEP
    size = LAST_EVEN
    while size < count:
        size = size * 9 // 8
    return size


def bucket(count: int) -> int:
    """The size that ``count`` rows of a prediction are padded to: 1, 2, then capacities."""
    return count if count <= 2 else ladder_size(count)


class Sizes(ABC):
    """Of one expert in one use. ``graphs`` is always a collection of the sizes captured so far.

    needed: sights, or steps, before anything is captured. top: samples of the largest batch so far:
    no group is larger. least: rows of a group that is replayed: no smaller one is asked about.
    """

    def __init__(self):
        self.needed, self.top, self.least = MIN_SEEN, 0, 1

    def step(self, count: int, samples: int) -> None:
        """A step of ``samples`` begins, in which the expert has ``count`` rows, maybe none."""
        self.top = max(self.top, samples)

    @abstractmethod
    def wanted(self, count: int, graphs: Collection[int]) -> list[int]:
        """The sizes to capture now that a group of ``count`` rows is here, largest first. Once for
        each group."""

    @abstractmethod
    def ahead(self, count: int) -> list[int]:
        """The sizes that groups to come will need, as far as is known of them: ``count`` rows are
        here, maybe none. Largest first."""

    @property
    @abstractmethod
    def largest(self) -> int:
        """Of all sizes that are likely to be captured."""

    @abstractmethod
    def place(self, count: int, graphs: Collection[int]) -> int | None:
        """The graph to replay for ``count`` rows; None: it has to run eagerly."""

    def captured(self, size: int) -> None:  # noqa: B027  # not every rule heeds it
        """There is a graph of that size now."""

    @abstractmethod
    def dropped(self) -> None:
        """The graphs were freed: as much must be seen again before any is captured. What was known
        of the expert's rows, their mean too, is forgotten."""


class SeenSizes(Sizes):
    """Sizes as they are seen. buckets: whether rows may be added."""

    def __init__(self, buckets: bool):
        super().__init__()
        self._buckets, self._seen = buckets, Counter()

    def wanted(self, count: int, graphs: Collection[int]) -> list[int]:
        size = self._size(count)
        if size in graphs:
            return []
        self._seen[size] += 1
        if self._seen[size] < self.needed:
            return []
        # Memory that is too small for the next size is no use to it.
        return [size] if graphs else sorted({size, self.largest}, reverse=True)

    def ahead(self, count: int) -> list[int]:
        return [self._size(count)] if count else []

    @property
    def largest(self) -> int:
        return max(self._seen, default=0)

    def place(self, count: int, graphs: Collection[int]) -> int | None:
        size = self._size(count)
        return size if size in graphs else None

    def dropped(self) -> None:
        self._seen.clear()

    def _size(self, count: int) -> int:
        return min(bucket(count), self.top) if self._buckets else count


class CapacitySizes(Sizes):
    """Few sizes, from the expert's share of the batch; none holds only groups that are too small to
    be replayed.

    An expert without rows so far gets the smallest size alone: with a share of more than 3/N it
    would have had a row of N samples with a probability of 95 %.
    """

    def __init__(self):
        super().__init__()
        self._steps = 0  # since the graphs were dropped
        self._share = 0.0  # of the batch, that comes to this expert
        # size -> rows that were padded for want of it: all, and those of late
        self._lack: dict[int, float] = {}
        self._lately: dict[int, float] = {}
        self._above_lately = 0.0  # groups above the largest size

    def step(self, count: int, samples: int) -> None:
        super().step(count, samples)
        self._steps += 1
        self._share += (count / samples - self._share) / min(self._steps, AVERAGED)
        self._above_lately *= 1 - 1 / RECENT
        for size in self._lately:
            self._lately[size] *= 1 - 1 / RECENT

    def wanted(self, count: int, graphs: Collection[int]) -> list[int]:
        if self._steps < self.needed:
            return []
        if not graphs:
            return self.ahead(count)
        place, size = self.place(count, graphs), self._size(count)
        if place is None:
            self._above_lately += 1
            drifted = self._above(MOVED) > max(graphs) or self._above_lately > OFTEN
            return [max(size, self._above(HEADROOM))] if drifted else []
        while size < place:
            for lack in (self._lack, self._lately):
                lack[size] = lack.get(size, 0.0) + place - size
            size = self._size(size + 1)
        paid = (
            size
            for size, rows in self._lack.items()
            if rows >= CAPTURE_ROWS or self._lately[size] >= RECENT_ROWS
        )
        return sorted(paid, reverse=True)[:1]

    def ahead(self, count: int) -> list[int]:
        sizes, size = {self.largest}, self._above(-AROUND)
        if count:
            sizes.add(min(self._size(count), self.largest))
        while size <= self.largest:
            sizes.add(size)
            if size == self.top:
                break
            size = self._size(size + 1)
        return sorted(sizes, reverse=True)

    def place(self, count: int, graphs: Collection[int]) -> int | None:
        return min((size for size in graphs if size >= count), default=None)

    def captured(self, size: int) -> None:
        # What other sizes were wanted for, it may serve.
        self._forget()

    def dropped(self) -> None:
        self._steps = 0
        self._forget()

    def _forget(self) -> None:
        self._lack.clear()
        self._lately.clear()
        self._above_lately = 0.0

    @property
    def largest(self) -> int:
        # The mean itself is as uncertain as the steps are few that it was taken over.
        steps = min(max(MIN_SEEN, self._steps), AVERAGED)
        return self._above(AROUND * math.sqrt(1 + 1 / steps))

    def _above(self, deviations: float) -> int:
        """The size so far above the rows that are expected in the largest batch."""
        mean = self._share * self.top
        return self._size(math.ceil(mean + deviations * math.sqrt(mean * (1 - self._share))))

    def _size(self, count: int) -> int:
        return min(ladder_size(max(count, self.least)), self.top)
