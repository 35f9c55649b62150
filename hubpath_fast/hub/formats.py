"""What a file of weights is, by its first bytes: endings mislead, and a download may be a page.

Two formats are read, safetensors and what ``torch.save`` writes, each under any ending, and the
index of a checkpoint in several files. Of anything else a message says what it is, and what to do.
"""

from __future__ import annotations

import zipfile
from codecs import BOM_UTF8
from pathlib import Path

from .errors import HubError

SAFETENSORS, TORCH, INDEX = "safetensors", "torch", "index"

HEAD_BYTES = 512
MAX_HEADER_BYTES = 100_000_000  # of safetensors' header, as its own reader allows
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch's magic number

UNPACK = "unpack it and name the file of weights inside"
FOREIGN = "a hub reads PyTorch's weights alone: look for them as safetensors or .pth, or convert it"

# (offset, bytes there, what begins so and what to do)
SIGNATURES = (
    (0, b"version https://git-lfs", "is a pointer of git-lfs, not the weights themselves; fetch "
     "them with `git lfs pull` in its repository"),
    (0, b"\x1f\x8b", f"is compressed by gzip; {UNPACK}"),
    (0, b"BZh", f"is compressed by bzip2; {UNPACK}"),
    (0, b"\xfd7zXZ\0", f"is compressed by xz; {UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"is compressed by zstd; {UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"is a 7-Zip archive; {UNPACK}"),
    (0, b"Rar!", f"is a RAR archive; {UNPACK}"),
    (257, b"ustar", f"is a tar archive; {UNPACK}"),
    (0, b"\x89HDF\r\n\x1a\n", f"is an HDF5 file, as Keras and TensorFlow write them; {FOREIGN}"),
    (0, b"\x93NUMPY", f"is a NumPy array; {FOREIGN}"),
    (4, b"TFL3", f"is a TensorFlow Lite model; {FOREIGN}"),
    (0, b"GGUF", f"is a GGUF file; {FOREIGN}"),
    (0, b"<", "is a web page or XML, as a server's error or login page that was saved; download "
     "the file again"),
)  # fmt: skip
ENDINGS = {
    ".onnx": "an ONNX model",
    ".pb": "a TensorFlow graph",
    ".tflite": "a TensorFlow Lite model",
    ".h5": "a Keras file",
    ".index": "the index of a TensorFlow checkpoint",
    ".msgpack": "a Flax checkpoint",
    ".mlmodel": "a Core ML model",
    ".engine": "a TensorRT engine",
}


def kind_of(path: Path) -> str:
    """SAFETENSORS, TORCH or INDEX; HubError, with what the file is instead and what to do."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise HubError(f"{path} is empty (0 bytes): its download or copy failed; fetch it again")
    if 0 < int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:9] == b"{":
        return SAFETENSORS
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    if head.startswith(TORCH_LEGACY):
        return TORCH
    text = _as_text(head)
    if text is not None and text.startswith(("{", "[")):
        return INDEX
    if head.startswith(b"\x80"):
        raise HubError(
            f"{path} was written by pickle itself, not by torch.save: its objects could run code "
            "and are refused. Where you trust it, load it and save the tensors as safetensors."
        )
    for offset, signature, what in SIGNATURES:
        if head.removeprefix(BOM_UTF8)[offset:].lstrip().startswith(signature):
            raise HubError(f"{path} {what}")
    if path.suffix.lower() in ENDINGS or ".data-0" in path.name:
        what = ENDINGS.get(path.suffix.lower(), "a part of a TensorFlow checkpoint")
        raise HubError(f"{path} is {what}; {FOREIGN}")
    if b"onnx" in head or (head[:1] == b"\x08" and b"pytorch" in head):
        raise HubError(f"{path} is {ENDINGS['.onnx']}; {FOREIGN}")
    found = f"text, {text[:60]!r}" if text is not None else f"of an unknown kind, {head[:8]!r}..."
    raise HubError(f"{path} is broken or no file of weights: what it begins with is {found}")


def _as_text(head: bytes) -> str | None:
    """The beginning of a text file, without a byte order mark; None: it is no text."""
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \r\n\t")
    plain = all(character.isprintable() or character.isspace() for character in text)
    return text if text and plain and len(text) > 0.9 * len(head.strip()) else None


def _archive(path: Path) -> str:
    """Of a zip: torch's own files are zips, and so are many others."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise HubError(
            f"{path} is broken: it begins as a checkpoint, and its end is missing ({error}); copy "
            "or download it again"
        ) from error
    inside = {name.partition("/")[2] for name in names}
    if "archive_format" in inside or any(name.startswith("models/") for name in inside):
        raise HubError(
            f"{path} is a program of torch.export, not tensors by name; save the state dict of the "
            "model that it was made from"
        )
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise HubError(
            f"{path} is a TorchScript program, which is not run; where you trust it, save its "
            f"tensors: torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        )
    if "data.pkl" in inside:
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        raise HubError(f"{path} is a NumPy archive, as JAX's networks are saved; {FOREIGN}")
    if "model.weights.h5" in names:
        raise HubError(f"{path} is a Keras file; {FOREIGN}")
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise HubError(f"{path} is a zip archive of {len(names)} files ({some}); {UNPACK}")
