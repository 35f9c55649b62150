"""Tensors that rest in files: memory that may leave at any time, and comes back when it is touched.

Their memory is mapped. Of a scratch file, shared: what is written to it is the file's, so pages may
be dropped from the process without losing a bit, and tensors, addresses and whoever points at them
stay as they are. Of a saved model's own file, private: pages that were only read are dropped and
read again; where one was written, its tensors move to a scratch file first. Scratch files have no
name any more once they are mapped, so that nothing stays behind, however the process ends.

What walks over many tensors (saving, looking for values that are not finite) calls ``release`` as
it goes; what makes memory of a parameter's size (the optimizer's state) asks ``beside``. Where no
tensor rests, both cost nothing.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

# Of torch's memory on a CPU. Elsewhere some products take other instructions, and round otherwise.
ALIGNMENT = 64
POPULATE_READ = 22  # of Linux, from 5.14 on: reads pages in, and fails where a touch would kill
PRESENT, SWAPPED, OF_FILE = 63, 62, 61  # bits of /proc/self/pagemap


class Mapping:
    """A mapped file's memory, which is let go with the last storage that is part of it."""

    def __init__(self, storage: torch.UntypedStorage, address: int, nbytes: int):
        self.storage, self.address, self.nbytes = storage, address, nbytes

    def holds(self, tensor: Tensor) -> bool:
        return self.address <= tensor.data_ptr() < self.address + self.nbytes

    def fetch(self) -> None:
        """Reads all of it in. OSError where that fails."""
        try:
            _advise(self.address, self.nbytes, POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _advise(self.address, self.nbytes, mmap.MADV_WILLNEED)

    def drop(self) -> None:
        _advise(self.address, self.nbytes, mmap.MADV_DONTNEED)

    def is_used(self) -> bool:
        """Whether any tensor lies in it; True where torch does not tell."""
        count = getattr(torch._C, "_storage_Use_Count", None)  # private; from torch 2.1 on
        return count is None or count(self.storage._cdata) > 1


class SavedFile(Mapping):
    """A saved model's file that is mapped. address: of its first byte. tensor: one that lies in it,
    which keeps the mapping."""

    def __init__(self, path: Path, address: int, tensor: Tensor):
        super().__init__(tensor.untyped_storage(), address, os.stat(path).st_size)
        self.path, self._was = path, _identity(path)

    def check(self) -> None:
        """OSError where the file was removed, replaced or changed since it was opened: what is
        mapped of one that was cut off cannot be touched without ending the process."""
        if (now := _identity(self.path)) != self._was:
            what = "removed" if now is None else "replaced or changed"
            raise OSError(errno.ESTALE, f"was {what} while its model is in use", str(self.path))

    def fetch(self) -> None:
        """OSError also as of ``check``."""
        self.check()
        super().fetch()

    def written(self) -> bool:
        """Whether this process wrote to it; True where the system does not tell."""
        first, count = self.address // mmap.PAGESIZE, -(-self.nbytes // mmap.PAGESIZE)
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as file:
                file.seek(first * 8)
                told = bytearray(file.read(count * 8))
        except OSError:
            return True
        if len(told) != count * 8:
            return True
        pages = torch.frombuffer(told, dtype=torch.int64)
        own = ((pages >> PRESENT) | (pages >> SWAPPED)) & 1
        return bool((own & ~(pages >> OF_FILE)).any())


class Place:
    """Where the tensors of one expert rest, with what an optimizer keeps of them.

    tensors: parameters and buffers, which keep their identity. files: those that some of them lie
    in already, and stay in until they are written; the others are moved at once.

    Attributes: nbytes, of the tensors; state_nbytes, of what lies beside them; copies: of what is
    trained, that an optimizer keeps; wanted: whether ``release`` leaves it alone; files; here,
    held: of a place whose tensors move (``executors.resident.on_device``): this one's come when
    they are touched, and may leave at any time.

    Raises OSError where the disk has no room.
    """

    def __init__(self, tensors: Iterable[Tensor], files: Sequence[SavedFile] = ()):
        self.tensors = [t for t in tensors if t.numel() and not t.is_meta]
        self.nbytes = sum(t.nbytes for t in self.tensors)
        self.state_nbytes, self.copies, self.wanted = 0, 0, False
        self.files = list(files)
        self._values: list[Mapping] = []
        self._state: list[Mapping] = []
        self._former: list[Mapping] = []  # of optimizers that may be gone
        self._free = 0  # bytes at the end of the last of these
        self._move([t for t in self.tensors if not any(f.holds(t) for f in self.files)])
        self.files = [f for f in self.files if any(map(f.holds, self.tensors))]
        for tensor in self.tensors:
            _places[tensor.untyped_storage().data_ptr()] = self

    here, held = True, False

    def leave_files(self) -> None:
        """Moves all out of the saved model's files, and lets the memory go unless it is wanted."""
        self.make_writable(self.tensors)
        if not self.wanted:
            self.drop()

    def use(self) -> None:
        """Nothing has to be waited for."""

    def home(self) -> None:
        """Nothing has moved."""

    def arrive(self) -> None:
        """Nothing is on its way."""

    def intact(self) -> bool:
        """Whether its tensors still lie where they were put."""
        return self._addresses == [t.data_ptr() for t in self.tensors]

    def make_writable(self, tensors: Iterable[Tensor]) -> None:
        """Moves those of its tensors out of the saved model's file, before something writes. Raises
        OSError where that file is not what was opened."""
        if self.files:
            own = {id(t) for t in self.tensors}
            inside = [t for t in tensors if any(f.holds(t) for f in self.files)]
            inside = [t for t in inside if id(t) in own]
            if inside:
                self.check()
            self._move(inside)
            for left in [f for f in self.files if not any(map(f.holds, self.tensors))]:
                left.drop()
                self.files.remove(left)

    def check(self) -> None:
        """Raises OSError naming a file that is not what was opened."""
        for file in self.files:
            file.check()

    def new_state(self) -> None:
        """An optimizer begins: what an earlier one kept here counts no more, and is let go with
        that one."""
        self._former = [m for m in (*self._former, *self._state) if m.is_used()]
        self._state, self._free, self.state_nbytes = [], 0, 0

    def zeros_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for what is kept of one of its tensors, in that one's layout."""
        size = padded(tensor.numel() * dtype.itemsize)
        if size > self._free:
            trained = sum(padded(t.nbytes) for t in self.tensors if t.requires_grad)
            self._free = max(size, trained)
            self._state.append(_scratch(self._free))
            _places[self._state[-1].address] = self
        mapping = self._state[-1]
        made = view_of(mapping.storage, mapping.nbytes - self._free, tensor, dtype)
        self._free -= size
        self.state_nbytes += made.nbytes
        return made

    def fetch(self) -> None:
        """Reads the tensors in. Raises OSError naming a file that is not what was opened."""
        for mapping in (*self.files, *self._values):
            mapping.fetch()

    def drop(self) -> None:
        """Lets the memory go; what is touched comes back."""
        if any(mapping.written() for mapping in self.files):
            self.make_writable(self.tensors)
        for mapping in (*self.files, *self._values, *self._state, *self._former):
            mapping.drop()

    def _move(self, tensors: Sequence[Tensor]) -> None:
        if tensors:
            mapping, start = _scratch(sum(padded(t.nbytes) for t in tensors)), 0
            for tensor in tensors:
                moved = view_of(mapping.storage, start, tensor, tensor.dtype).copy_(tensor.detach())
                start += padded(tensor.nbytes)
                tensor.data = moved
            self._values.append(mapping)
            _places[mapping.address] = self
        self._addresses = [t.data_ptr() for t in self.tensors]


_places: WeakValueDictionary[int, Place] = WeakValueDictionary()  # by the address of a mapping


def register(place: Any, here: Iterable[int], gone: Iterable[int]) -> None:
    """Says that a place has tensors at these addresses of storages, and none at those any more."""
    for address in gone:
        if _places.get(address) is place:
            del _places[address]
    _places.update(dict.fromkeys(here, place))


def bring_home(tensors: Iterable[Tensor]) -> None:
    """Has those that rest be where they do: who keeps them from now on keeps no device's memory.
    Raises OSError where a file that they rest in is not what was opened."""
    places = _places_of(tensors)
    for place in places:
        place.home()
    for place in places:
        place.arrive()
        place.check()


def leave_folder(tensors: Iterable[Tensor], folder: Path) -> None:
    """Has those that rest in files of a folder rest elsewhere, before that one is replaced."""
    whole = folder.resolve()
    for place in _places_of(tensors):
        if any(whole in file.path.resolve().parents for file in place.files):
            place.leave_files()


def _places_of(tensors: Iterable[Tensor]) -> list[Any]:
    """Of those that rest, each once."""
    if not _places:
        return []
    return list({id(p): p for p in map(place_of, tensors) if p is not None}.values())


def beside(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros like a parameter, which rest where it does."""
    place = place_of(parameter)
    if place is None:
        return torch.zeros_like(parameter, dtype=dtype)
    return place.zeros_like(parameter, dtype or parameter.dtype)


def copy_beside(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a value that is kept of a parameter; in its layout, where that one rests."""
    if place_of(parameter) is None or value.shape != parameter.shape:
        return value.clone()
    return beside(parameter, value.dtype).copy_(value)


def release(tensors: Iterable[Tensor]) -> None:
    """Says that these were read, and will not be again soon: those that rest leave memory, but for
    what was in use anyway."""
    leaving = [place for place in _places_of(tensors) if not place.wanted]
    for place in leaving:
        place.drop()
    for place in leaving:
        place.arrive()


def one_by_one(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The same tensors: those that do not rest, if there are any, then place by place, each of
    which is released before the next."""
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(id(place_of(tensor)), []).append(tensor)
    plain = groups.pop(id(None), [])
    yield from [plain] if plain else []
    for group in groups.values():
        yield group
        release(group)


def forget(mapped: Callable[[], SavedFile | None]) -> None:
    """Says that a saved model's file was read, and what it holds copied elsewhere. mapped: gives
    the file, None where it is not mapped; called where any tensor rests."""
    if _places and (file := mapped()) is not None and not file.written():
        file.drop()


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def can_rest() -> bool:
    """Whether the system drops pages when it is asked to."""
    return hasattr(mmap, "MADV_DONTNEED")


def expect(parameters: Iterable[Tensor], copies: int) -> None:
    """Says that a new optimizer will keep so many tensors like each of these beside it."""
    for place in _places_of(parameters):
        place.new_state()
        place.copies = copies


def rests(tensor: Tensor) -> bool:
    return place_of(tensor) is not None


def place_of(tensor: Tensor) -> Place | None:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    return _places.get(tensor.untyped_storage().data_ptr())


def _scratch(nbytes: int) -> Mapping:
    """Zeros, in a file without a name. All of its room is taken now: later there is no error that
    could say that the disk is full."""
    descriptor, name = tempfile.mkstemp(prefix="hubpath-", dir=_scratch_folder())
    try:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, nbytes)
            else:
                os.truncate(descriptor, nbytes)
        except OSError as error:
            what = f"{os.strerror(error.errno)}: experts rest there in {nbytes:,} bytes more"
            raise OSError(error.errno, f"{what}; set TMPDIR to a larger disk", name) from None
        finally:
            os.close(descriptor)
        storage = torch.UntypedStorage.from_file(name, True, nbytes)
        return Mapping(storage, storage.data_ptr(), nbytes)
    finally:
        os.unlink(name)


def _scratch_folder() -> str:
    """TMPDIR, or what lies on a disk: many systems keep /tmp in memory, where nothing is gained."""
    lasting = "/var/tmp"
    if "TMPDIR" not in os.environ and os.access(lasting, os.W_OK):
        return lasting
    return tempfile.gettempdir()


def view_of(storage: torch.UntypedStorage, start: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape at a byte of a storage, in its layout if that has no gaps."""
    dense = torch.empty_like(like, dtype=dtype, device="meta", memory_format=torch.preserve_format)
    flat = torch.empty(0, dtype=dtype, device=storage.device)
    return flat.set_(storage, start // dtype.itemsize, dense.shape, dense.stride())


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache
def _madvise():
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _advise(address: int, nbytes: int, advice: int) -> None:
    if _madvise()(address, nbytes, advice):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
