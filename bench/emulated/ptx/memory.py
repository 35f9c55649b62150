"""Memory that is watched: bounds, alignment, what nothing wrote, and races.

A granule is the largest unit of bytes that no access of a kernel divides. For each, the memory
keeps which warp wrote and read it last, and in which phase: the time of one program between two
barriers. Two warps that touch a granule in one phase, one of them to change it, race.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Owners of global memory: a program is one more than its number, so that zeros are nobody's.
NOBODY, SEVERAL = 0, -1
# Each buffer has a terabyte of addresses to itself: an offset that runs out of one cannot land in
# the next.
REGION_BITS = 40
# A mark is a phase and a warp of it, of at most 32: phase * PHASE + warp. Phases begin at 1, so
# that zeros are no mark: memory of zeros costs nothing until it is used.
PHASE = 64
_SEVERAL_WARPS = PHASE - 1


class Fault(Exception):
    """What a GPU would not have survived, or would have answered differently each time."""


class Who(NamedTuple):
    """The threads of an access, [n] each; mark: of the warp, in a phase unlike any other
    program's."""

    program: np.ndarray
    mark: np.ndarray

    def some(self, which: np.ndarray) -> Who:
        return Who(*(part[which] for part in self))


class Buffer(NamedTuple):
    """A kernel's argument in global memory: its name and its bytes, [size] uint8.

    lead: how far it begins behind a multiple of 64.
    """

    name: str
    data: np.ndarray
    lead: int = 0


class Races:
    """Who touched each granule last, within a program, and which two of them race."""

    def __init__(self, granules: int) -> None:
        self.written, self.read = (np.zeros(granules, np.int64) for _ in range(2))

    def reads(self, granules: np.ndarray, who: Who) -> np.ndarray:
        """Record reads of [n, g] granules; which, [n, g], race with a write."""
        mark = who.mark[:, None]
        racing = _of_others(self.written[granules], mark)
        several = _of_others(self.read[granules], mark)
        self.read[granules] = mark
        # Where several warps read one granule at once, the last one's mark is what stayed.
        several |= _of_others(self.read[granules], mark)
        if several.any():
            marks = np.broadcast_to(mark | _SEVERAL_WARPS, granules.shape)
            self.read[granules[several]] = marks[several]
        return racing

    def writes(self, granules: np.ndarray, who: Who, changed: np.ndarray) -> np.ndarray:
        """Record writes; ``changed``: [n, g], where they are not of what is there already."""
        mark = who.mark[:, None]
        racing = changed & _of_others(self.written[granules], mark)
        racing |= _of_others(self.read[granules], mark)
        self.written[granules] = mark
        return racing


def _of_others(marks: np.ndarray, mark: np.ndarray) -> np.ndarray:
    """Which marks are of the same phase and of another warp."""
    difference = marks ^ mark
    return (difference > 0) & (difference < PHASE)


class Watched:
    """Bytes with their marks. A place is the number of a byte, checked by whoever calls."""

    def __init__(self, size: int, granule: int) -> None:
        self.granule = granule
        self.data = np.zeros(-(-size // 64) * 64, np.uint8)
        self.races = Races(len(self.data) // granule)

    def cells(self, size: int) -> np.ndarray:
        """The bytes in pieces of one access's size: numpy moves these faster than rows of bytes."""
        return self.data.view(f"V{size}")

    def get(self, places: np.ndarray, size: int) -> np.ndarray:
        """[n, size] bytes."""
        return self.cells(size).take(places // size).view(np.uint8).reshape(-1, size)

    def granules(self, places: np.ndarray, size: int) -> np.ndarray:
        """[n, size / granule] numbers."""
        return (places // self.granule)[:, None] + np.arange(size // self.granule)

    def put(self, places: np.ndarray, values: np.ndarray, who: Who, granules: np.ndarray) -> None:
        """Write [n, size] bytes. Raises Fault if two threads race to one place."""
        size = values.shape[1]
        different = (self.get(places, size) != values).reshape(*granules.shape, -1).any(axis=2)
        racing = self.races.writes(granules, who, different)
        self.cells(size)[places // size] = np.ascontiguousarray(values).view(f"V{size}").reshape(-1)
        unlike = self.get(places, size) != values
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
        """Raises Fault with the first place, [n], that is ``wrong``, [n] or [n, g]."""
        if wrong.any():
            at = wrong if wrong.ndim == 1 else wrong.any(axis=1)
            raise Fault(f"{what}, {self.place(places[at][0])}")

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
        return self.get(places, size)

    def reading(self, places: np.ndarray, size: int, who: Who) -> np.ndarray:
        """Record a read, of wherever its bytes are taken; its granules. Raises Fault as load."""
        granules = self.granules(places, size)
        self.forbid(self.arriving[granules], places, "read of what an unfinished copy writes")
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
        missing = ~self.initialised[granules]
        self.forbid(missing, places, "read of shared memory that nothing wrote")

    def check_idle(self, places: np.ndarray, granules: np.ndarray) -> None:
        busy = self.arriving[granules] | (self.in_use[granules] > 0)
        self.forbid(busy, places, "write to what an unfinished copy or product uses")

    def places(self, offsets: np.ndarray, size: int, who: Who, what: str) -> np.ndarray:
        offsets = offsets.astype(np.int64)
        if offsets.min(initial=0) < 0 or offsets.max(initial=0) + size > self.each:
            outside = (offsets < 0) | (offsets + size > self.each)
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
    Most buffers are only read or only written: reads are watched of those ``both`` [buffers] names,
    and ``touched`` says afterwards which these have to be.
    """

    def __init__(
        self, buffers: Sequence[Buffer], granule: int, both: np.ndarray | None = None
    ) -> None:
        self.buffers = buffers
        self.sizes = np.array([len(buffer.data) for buffer in buffers], np.int64)
        self.leads = np.array([buffer.lead for buffer in buffers], np.int64)
        ends = np.cumsum([0, *(-(-size // 64) * 64 for size in self.leads + self.sizes)])
        self.starts = ends[:-1] + self.leads
        super().__init__(int(ends[-1]), granule)
        for start, buffer in zip(self.starts, buffers, strict=True):
            self.data[start : start + len(buffer.data)] = buffer.data
        self.owner = np.zeros(len(self.data) // granule, np.int32)  # the program that wrote
        self.log: list[tuple[np.ndarray, np.ndarray]] = []  # granules read, by which programs
        self._both = both
        self._read, self._written = (np.zeros(len(buffers), np.bool_) for _ in range(2))

    def touched(self) -> np.ndarray:
        """Which buffers were read and written, both, [buffers]."""
        return self._read & self._written

    @staticmethod
    def address(buffer: int, offset: int = 0) -> int:
        """Of a byte, counted from the multiple of 64 in front of the buffer's first."""
        return ((buffer + 1) << REGION_BITS) + offset

    def load(self, addresses: np.ndarray, size: int, who: Who) -> np.ndarray:
        """[n, size] bytes at [n] addresses."""
        places = self._places(addresses, size, who, "load", self._read)
        if self._both is not None:
            self._watch_reads(places, size, who)
        return self.get(places, size)

    def _watch_reads(self, places: np.ndarray, size: int, who: Who) -> None:
        some = self._both[np.searchsorted(self.starts, places, side="right") - 1]
        if some.any():
            places, who = places[some], who.some(some)
            granules = self.granules(places, size)
            self.log.append((granules, who.program))
            self.note_reads(places, granules, who)

    def store(self, addresses: np.ndarray, values: np.ndarray, who: Who) -> None:
        places = self._places(addresses, values.shape[1], who, "store", self._written)
        granules = self.granules(places, values.shape[1])
        owner = who.program[:, None] + 1
        before = self.owner[granules]
        self.owner[granules] = owner
        twice = ((before != NOBODY) & (before != owner)) | (self.owner[granules] != owner)
        self.forbid_programs(twice, places, who.program, "writes")
        self.put(places, values, who, granules)

    def atomic(self, addresses: np.ndarray, size: int, who: Who) -> np.ndarray:
        """Places that atomic operations are to change: of several programs, if none else does."""
        places = self._places(addresses, size, who, "atomic", self._written)
        granules = self.granules(places, size)
        owner = self.owner[granules]
        racing = (owner != NOBODY) & (owner != SEVERAL) & (owner != who.program[:, None] + 1)
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
            racing = (owner != NOBODY) & (owner != program[:, None] + 1)
            self.forbid_programs(racing, granules[:, 0] * self.granule, program, "reads")
        for start, buffer in zip(self.starts, self.buffers, strict=True):
            buffer.data[:] = self.data[start : start + len(buffer.data)]

    def _places(
        self, addresses: np.ndarray, size: int, who: Who, what: str, touched: np.ndarray
    ) -> np.ndarray:
        """The buffers are marked as ``touched``."""
        regions = (addresses >> np.uint64(REGION_BITS)).astype(np.int64) - 1
        if not len(regions):
            return regions
        region = regions[0] if (regions == regions[0]).all() else regions
        offset = (addresses & np.uint64((1 << REGION_BITS) - 1)).astype(np.int64)
        known = (region >= 0) & (region < len(self.buffers))
        if np.all(known):
            lead = self.leads[region]
            outside = (offset < lead) | (offset + size > lead + self.sizes[region])
        else:
            outside = np.broadcast_to(~known, offset.shape)
        if outside.any():
            address, program = int(addresses[outside][0]), who.program[outside][0]
            raise Fault(
                f"{what} out of bounds: {size} bytes at {self._whereabouts(address)},"
                f" program {program}"
            )
        _aligned(offset, size, what)
        touched[region] = True
        return offset + (self.starts[region] - lead)

    def _whereabouts(self, address: int) -> str:
        """The buffer nearest to an address, and how far from its first byte."""
        near = round(address / (1 << REGION_BITS)) - 1
        if not 0 <= near < len(self.buffers):
            return f"address {address:#x}, in no argument"
        offset = address - self.address(near, self.buffers[near].lead)
        return f"byte {offset} of {self.buffers[near].name}, which has {self.sizes[near]}"

    def place(self, place: int) -> str:
        near = int(np.searchsorted(self.starts, place, side="right")) - 1
        return f"byte {int(place) - self.starts[near]} of {self.buffers[near].name}"


def _aligned(offsets: np.ndarray, size: int, what: str) -> None:
    wrong = offsets & (size - 1)  # a power of two
    if wrong.any():
        raise Fault(f"misaligned {what} of {size} bytes at byte {offsets[wrong > 0][0]}")
