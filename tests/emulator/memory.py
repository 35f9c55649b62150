"""Memory that is watched: bounds, alignment, what nothing wrote, and races.

A granule is the largest unit of bytes that no access of a kernel divides. For each, the memory
keeps which warp wrote and read it last, and in which phase: the time of one program between two
barriers. Two warps that touch a granule in one phase, one of them to change it, race.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NOBODY, SEVERAL = -1, -2
# Each buffer has a terabyte of addresses to itself: an offset that runs out of one cannot land in
# the next.
REGION_BITS = 40


class Fault(Exception):
    """What a GPU would not have survived, or would have answered differently each time."""


class Who(NamedTuple):
    """The threads of an access, [n] each."""

    program: np.ndarray
    warp: np.ndarray  # within its program
    phase: np.ndarray  # unlike any other program's

    def some(self, which: np.ndarray) -> Who:
        return Who(*(part[which] for part in self))


class Buffer(NamedTuple):
    """A kernel's argument in global memory: its name and its bytes, [size] uint8."""

    name: str
    data: np.ndarray


class Races:
    """Who touched each granule last, within a program, and which two of them race."""

    def __init__(self, granules: int) -> None:
        self.writer, self.reader = (np.full(granules, NOBODY, np.int32) for _ in range(2))
        self.written, self.read = (np.full(granules, NOBODY, np.int64) for _ in range(2))  # phases

    def reads(self, granules: np.ndarray, who: Who) -> np.ndarray:
        """Record reads of [n, g] granules; which of the n race with a write."""
        warp, phase = who.warp[:, None], who.phase[:, None]
        racing = (self.written[granules] == phase) & (self.writer[granules] != warp)
        before = self.reader[granules]
        others = (self.read[granules] == phase) & (before != warp)
        self.reader[granules] = np.where(others, SEVERAL, warp)
        # Where several warps read one granule at once, the last one's mark is what stayed.
        lost = self.reader[granules] != warp
        self.reader[granules[lost]] = SEVERAL
        self.read[granules] = phase
        return racing.any(axis=1)

    def writes(self, granules: np.ndarray, who: Who, changed: np.ndarray) -> np.ndarray:
        """Record writes; ``changed``: [n, g], where they are not of what is there already."""
        warp, phase = who.warp[:, None], who.phase[:, None]
        racing = changed & (self.written[granules] == phase) & (self.writer[granules] != warp)
        racing |= (self.read[granules] == phase) & (self.reader[granules] != warp)
        self.writer[granules], self.written[granules] = warp, phase
        return racing.any(axis=1)


class Watched:
    """Bytes with their marks. A place is the number of a byte, checked by whoever calls."""

    def __init__(self, size: int, granule: int) -> None:
        self.granule = granule
        self.data = np.zeros(-(-size // 64) * 64, np.uint8)
        self.races = Races(len(self.data) // granule)

    def cells(self, size: int) -> np.ndarray:
        """The bytes in rows of one access's size."""
        return self.data.reshape(-1, size)

    def granules(self, places: np.ndarray, size: int) -> np.ndarray:
        """[n, size / granule] numbers."""
        return (places // self.granule)[:, None] + np.arange(size // self.granule)

    def put(self, places: np.ndarray, values: np.ndarray, who: Who, granules: np.ndarray) -> None:
        """Write [n, size] bytes. Raises Fault if two threads race to one place."""
        size = values.shape[1]
        cells, rows = self.cells(size), places // size
        different = (cells[rows] != values).reshape(*granules.shape, -1).any(axis=2)
        racing = self.races.writes(granules, who, different)
        cells[rows] = values
        unlike = (cells[rows] != values).any(axis=1)
        self.forbid(
            racing, places, "race: a warp writes what another one used with no barrier between"
        )
        self.forbid(unlike, places, "race: threads write different values to one place at once")

    def note_reads(self, places: np.ndarray, granules: np.ndarray, who: Who) -> None:
        self.forbid(
            self.races.reads(granules, who),
            places,
            "race: a warp reads what another one wrote with no barrier between",
        )

    def forbid(self, wrong: np.ndarray, places: np.ndarray, what: str) -> None:
        """Raises Fault with the first place that is ``wrong``, both [n]."""
        if wrong.any():
            raise Fault(f"{what}, {self.place(places[wrong][0])}")

    def place(self, place: int) -> str:
        """A byte's whereabouts, for messages."""
        raise NotImplementedError


class SharedMemory(Watched):
    """The shared memory of several programs, which cannot see each other's."""

    def __init__(self, first_program: int, programs: int, size: int, granule: int) -> None:
        self.each, self.first = size, first_program
        self.stride = -(-size // 64) * 64
        super().__init__(programs * self.stride, granule)
        self.initialised = np.zeros(len(self.data) // granule, np.bool_)
        # Granules that an unfinished copy is still to write, and how many unfinished products read.
        self.arriving = np.zeros_like(self.initialised)
        self.in_use = np.zeros(len(self.initialised), np.int32)

    def load(self, offsets: np.ndarray, size: int, who: Who) -> np.ndarray:
        """[n, size] bytes at [n] offsets within each thread's program."""
        places = self.places(offsets, size, who, "load")
        self.reading(places, size, who)
        return self.cells(size)[places // size]

    def reading(self, places: np.ndarray, size: int, who: Who) -> np.ndarray:
        """Record a read, of wherever its bytes are taken; its granules. Raises Fault as load."""
        granules = self.granules(places, size)
        arriving = self.arriving[granules].any(axis=1)
        self.forbid(arriving, places, "read of what an unfinished copy writes")
        self._check_written(places, granules)
        self.note_reads(places, granules, who)
        return granules

    def store(self, offsets: np.ndarray, values: np.ndarray, who: Who) -> None:
        places = self.places(offsets, values.shape[1], who, "store")
        granules = self.granules(places, values.shape[1])
        self.check_idle(places, granules)
        self.put(places, values, who, granules)
        self.initialised[granules] = True

    def atomic(self, offsets: np.ndarray, size: int, who: Who) -> np.ndarray:
        """Places that atomic operations are to change, which do not race with each other."""
        places = self.places(offsets, size, who, "atomic")
        granules = self.granules(places, size)
        self.check_idle(places, granules)
        self._check_written(places, granules)
        return places

    def _check_written(self, places: np.ndarray, granules: np.ndarray) -> None:
        missing = ~self.initialised[granules].all(axis=1)
        self.forbid(missing, places, "read of shared memory that nothing wrote")

    def check_idle(self, places: np.ndarray, granules: np.ndarray) -> None:
        busy = (self.arriving[granules] | (self.in_use[granules] > 0)).any(axis=1)
        self.forbid(busy, places, "write to what an unfinished copy or product uses")

    def places(self, offsets: np.ndarray, size: int, who: Who, what: str) -> np.ndarray:
        offsets = offsets.astype(np.int64)
        outside = (offsets < 0) | (offsets + size > self.each)
        if outside.any():
            raise Fault(
                f"shared {what} out of bounds: {size} bytes at {offsets[outside][0]}"
                f" of {self.each}, program {who.program[outside][0]}"
            )
        _aligned(offsets, size, f"shared {what}")
        return (who.program - self.first) * self.stride + offsets

    def place(self, place: int) -> str:
        program, offset = divmod(int(place), self.stride)
        return f"byte {offset} of shared memory, program {program + self.first}"


class GlobalMemory(Watched):
    """The buffers of one launch, seen by all of its programs.

    Programs of a launch run in any order, so whatever one writes, no other may read or write.
    """

    def __init__(self, buffers: Sequence[Buffer], granule: int) -> None:
        self.buffers = buffers
        self.sizes = np.array([len(buffer.data) for buffer in buffers])
        self.starts = np.cumsum([0, *(-(-size // 64) * 64 for size in self.sizes)])[:-1]
        super().__init__(int(self.starts[-1] + self.sizes[-1]) if len(buffers) else 0, granule)
        for start, buffer in zip(self.starts, buffers, strict=True):
            self.data[start : start + len(buffer.data)] = buffer.data
        self.owner = np.full(len(self.data) // granule, NOBODY, np.int32)  # the program that wrote
        self.log: list[tuple[np.ndarray, np.ndarray]] = []  # granules read, by which programs

    @staticmethod
    def address(buffer: int, offset: int = 0) -> int:
        return ((buffer + 1) << REGION_BITS) + offset

    def load(self, addresses: np.ndarray, size: int, who: Who) -> np.ndarray:
        """[n, size] bytes at [n] addresses."""
        places = self._places(addresses, size, who, "load")
        granules = self.granules(places, size)
        self.log.append((granules, who.program))
        self.note_reads(places, granules, who)
        return self.cells(size)[places // size]

    def store(self, addresses: np.ndarray, values: np.ndarray, who: Who) -> None:
        places = self._places(addresses, values.shape[1], who, "store")
        granules = self.granules(places, values.shape[1])
        program = who.program[:, None]
        before = self.owner[granules]
        self.owner[granules] = program
        twice = ((before != NOBODY) & (before != program)) | (self.owner[granules] != program)
        self.forbid_programs(twice, places, who.program, "writes")
        self.put(places, values, who, granules)

    def atomic(self, addresses: np.ndarray, size: int, who: Who) -> np.ndarray:
        """Places that atomic operations are to change: of several programs, if none else does."""
        places = self._places(addresses, size, who, "atomic")
        granules = self.granules(places, size)
        owner = self.owner[granules]
        racing = (owner != NOBODY) & (owner != SEVERAL) & (owner != who.program[:, None])
        self.forbid_programs(racing, places, who.program, "changes")
        self.owner[granules] = SEVERAL
        return places

    def forbid_programs(
        self, racing: np.ndarray, places: np.ndarray, program: np.ndarray, does: str
    ) -> None:
        """Raises Fault with the first of the ``program`` [n] whose granules, [n, g], are racing."""
        at = racing.any(axis=1)
        if at.any():
            what = f"race between programs: {program[at][0]} {does} what another one writes"
            self.forbid(at, places, what)

    def finish(self) -> None:
        """Hand the results back, once all programs have run. Raises Fault if any of them raced."""
        for granules, program in self.log:
            owner = self.owner[granules]
            racing = (owner != NOBODY) & (owner != program[:, None])
            self.forbid_programs(racing, granules[:, 0] * self.granule, program, "reads")
        for start, buffer in zip(self.starts, self.buffers, strict=True):
            buffer.data[:] = self.data[start : start + len(buffer.data)]

    def _places(self, addresses: np.ndarray, size: int, who: Who, what: str) -> np.ndarray:
        region = (addresses >> np.uint64(REGION_BITS)).astype(np.int64) - 1
        offset = (addresses & np.uint64((1 << REGION_BITS) - 1)).astype(np.int64)
        known = (region >= 0) & (region < len(self.buffers))
        region = np.where(known, region, 0)
        outside = ~known | (offset + size > self.sizes[region])
        if outside.any():
            address, program = int(addresses[outside][0]), who.program[outside][0]
            raise Fault(
                f"{what} out of bounds: {size} bytes at {self._whereabouts(address)},"
                f" program {program}"
            )
        _aligned(offset, size, what)
        return self.starts[region] + offset

    def _whereabouts(self, address: int) -> str:
        """The buffer nearest to an address, and how far from its first byte."""
        near = round(address / (1 << REGION_BITS)) - 1
        if not 0 <= near < len(self.buffers):
            return f"address {address:#x}, in no argument"
        offset = address - self.address(near)
        return f"byte {offset} of {self.buffers[near].name}, which has {self.sizes[near]}"

    def place(self, place: int) -> str:
        near = int(np.searchsorted(self.starts, place, side="right")) - 1
        return f"byte {int(place) - self.starts[near]} of {self.buffers[near].name}"


def _aligned(offsets: np.ndarray, size: int, what: str) -> None:
    wrong = offsets % size != 0
    if wrong.any():
        raise Fault(f"misaligned {what} of {size} bytes at byte {offsets[wrong][0]}")
