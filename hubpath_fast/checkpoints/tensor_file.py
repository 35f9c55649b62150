"""One safetensors file: written with the hash of its data in its header, opened without reading it.

The header is at the front, so that a file of another save, or of another model, is found by some
hundred bytes. Tensors that are read are the file's own memory, mapped: pages come in when they are
touched, and what is written to them stays in this process.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ..files import replacing
from ..resting import ALIGNMENT, SavedFile
from .errors import damaged
from .layout import FORMAT

ALIASES, SHA256 = "aliases", "sha256"  # in the metadata; the first as JSON of {name: other name}
UNKNOWN = "0" * 64
BLOCK = 1 << 22

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> str:
    """Write tensors, one after another in memory of the CPU; the SHA-256 of the data."""
    about = {"format": "pt", "hubpath_format": str(FORMAT), ALIASES: json.dumps(dict(aliases))}
    return save_file(tensors, path, {**about, SHA256: UNKNOWN})


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> str:
    """As safetensors' own, which gives equal saves headers in another order, and memory that is
    mapped no alignment; and with the SHA-256 of the data, which is returned, in the metadata.

    Tensors whose bytes are a multiple of ``ALIGNMENT`` come first, and spaces fill the header up:
    of a file that is mapped, nearly all lie as torch's own memory does. Raises TypeError for a
    number type that the format has none for.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} is of {tensor.dtype}, which safetensors files cannot hold; convert it to "
                "another dtype"
            )
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    # Behind those, by the bytes of a number, so that each is where its numbers may lie; then by
    # name, so that equal saves are equal files.
    order = sorted(
        tensors, key=lambda n: (sizes[n] % ALIGNMENT != 0, -tensors[n].element_size(), n)
    )
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + sizes[name]
        shape, kind = list(tensors[name].shape), _DTYPES[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = _filled_up(json.dumps(header, separators=(",", ":")).encode())
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            digest.update(data)
            file.write(data)
        found = digest.hexdigest()
        file.seek(8)
        known = f'"{SHA256}":"{found}"'.encode()
        file.write(text.replace(f'"{SHA256}":"{UNKNOWN}"'.encode(), known, 1))
    return found


def replace_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """``save_file``, whole or absent. Raises OSError, and TypeError as that does."""
    about = {"format": "pt", **(metadata or {}), SHA256: UNKNOWN}
    with replacing(path) as file:
        save_file(tensors, Path(file.name), about)


def _filled_up(text: bytes) -> bytes:
    """With spaces behind, as the format allows, up to where the data are to start."""
    return text + b" " * (-(8 + len(text)) % ALIGNMENT)


class TensorFile:
    """An open file. aliases: names that are another of its tensors, with that one's name.

    sha256: of its data, as its header says; None of a file that this package did not write, or in
    format 0. Raises what safetensors and the system raise, and CheckpointError.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, safe_open(path, framework="pt", device="cpu")
        self.names = tuple(self._file.keys())
        metadata = self._file.metadata() or {}
        self.sha256: str | None = metadata.get(SHA256)
        self.aliases = _checked_aliases(path, metadata.get(ALIASES, "{}"), self.names)

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def mapped(self) -> SavedFile | None:
        """The memory that its tensors are, as a whole; None where it is not all mapped, or the file
        is not there any more."""
        try:
            with open(self._path, "rb") as file:
                start = _start(file)
                header = json.loads(file.read(start)[8:])
            begins = {name: start + header[name]["data_offsets"][0] for name in self.names}
            held = {name: t for name in self.names if (t := self.tensor(name)).numel()}
            addresses = {t.data_ptr() - begins[name] for name, t in held.items()}
            if len(addresses) == 1 and not (address := addresses.pop()) % mmap.PAGESIZE:
                return SavedFile(self._path, address, next(iter(held.values())))
        except (OSError, ValueError, KeyError):  # another file is there by now
            pass
        return None


def data_sha256(path: Path) -> str:
    """The SHA-256 of a file's data; reads all of it."""
    with open(path, "rb") as file:
        file.seek(_start(file))
        return _digest(file)


def _checked_aliases(path: Path, text: str, names: tuple[str, ...]) -> dict[str, str]:
    try:
        aliases: Any = json.loads(text)
        if set(aliases.values()) <= set(names):
            return aliases
    except (ValueError, AttributeError, TypeError):
        pass
    raise damaged(path, "its aliases are not of its tensors")


def _start(file: BinaryIO) -> int:
    """Where the data start; the file is then at its beginning."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    file.seek(0)
    return 8 + length


def _digest(file: BinaryIO) -> str:
    """Of what follows in the file."""
    found = hashlib.sha256()
    while block := file.read(BLOCK):
        found.update(block)
    return found.hexdigest()
