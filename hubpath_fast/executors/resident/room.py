"""The room that experts share in memory: who is in it, and who leaves first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from ...sizes import parse_bytes


def read_room(room: int | str) -> tuple[int | None, int | None]:
    """(bytes, None) of "8GB", (None, experts) of a number or its digits; ValueError for others."""
    if isinstance(room, str) and room.isascii() and room.isdecimal():
        room = int(room)
    if isinstance(room, int) and not isinstance(room, bool) and room >= 1:
        return None, room
    try:
        return parse_bytes("room", room if isinstance(room, str) else ""), None
    except ValueError:
        raise ValueError(
            f"room: expected bytes such as '8GB' or '500MiB', or a number of experts, got {room!r}"
        ) from None


class Room:
    """Experts in memory by number, with their bytes; the one used least recently is first."""

    def __init__(self):
        self._bytes: OrderedDict[int, int] = OrderedDict()

    def __contains__(self, index: int) -> bool:
        return index in self._bytes

    def __iter__(self):
        return iter(self._bytes)

    @property
    def used(self) -> int:
        return sum(self._bytes.values())

    def enter(self, index: int, nbytes: int, capacity: int, stay: Collection[int]) -> list[int]:
        """Lets one in, or tells that it is used again; those that leave for it, never one of
        ``stay``, though all may then take more than the capacity."""
        self._bytes[index] = nbytes
        self._bytes.move_to_end(index)
        left, used = [], self.used
        for other in list(self._bytes):
            if used <= capacity:
                break
            if other != index and other not in stay:
                used -= self._bytes.pop(other)
                left.append(other)
        return left

    def resize(self, index: int, nbytes: int) -> None:
        """One that is in it takes so much now; others leave for it when one comes."""
        self._bytes[index] = nbytes

    def leave(self, index: int) -> None:
        self._bytes.pop(index, None)
