"""A model into a folder: one file for each part, those that have not changed as links.

What has changed is told by torch's counters of writes in place and by the memory's address, looked
at when saving: a training step costs nothing. Buffers are compared by their values too, with copies
of those that were written: a replay of a captured forward pass moves BatchNorm's statistics and no
counter. Of parameters the counters miss: fused optimizer updates and replays of captured ones
(whoever runs them counts them: ``training.optimizer_files.count_updates``), writes through
``.data``, and those of what is not torch (NumPy, DLPack, kernels that do not declare what they
write). Who writes so saves without ``previous``, or calls
``torch.autograd.graph.increment_version``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..resting import bring_home, release
from .layout import CONFIG_FILE, FORMAT, INDEX_FILE, SINGLE_FILE, Part, parts_of
from .read import FORMAT_KEY, SavedModel
from .tensor_file import TensorFile, write_tensors

LIBRARY = "hubpath_fast"
PACKAGES = (LIBRARY, "torch", "timm", "safetensors")


@dataclass(frozen=True)
class Mark:
    """A tensor when it was written. memory: the tensor again, without a gradient: as long as this
    holds it, no other tensor can lie there. value: a copy, of what its counter may not tell of."""

    memory: Tensor
    version: int | None
    value: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, moving: bool = False) -> Mark:
        held = tensor.detach()
        version = None if held.is_inference() else held._version
        return cls(held, version, held.clone() if moving else None)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is the one that was written, and nothing has written to it since."""
        mine, now = self.memory, tensor.detach()
        return (
            self.version is not None
            and not now.is_inference()
            and now._version == self.version
            and now.device == mine.device
            and now.dtype == mine.dtype
            and now.data_ptr() == mine.data_ptr()
            and now.shape == mine.shape
            and now.stride() == mine.stride()
            and (self.value is None or torch.equal(now, self.value))
        )


@dataclass(frozen=True)
class Record:
    """A file that was written: where it lies, the hash of its data, and of which tensors."""

    path: Path
    sha256: str
    marks: Mapping[str, Mark]
    aliases: Mapping[str, str]

    def holds(self, part: Part, watched: Mapping[str, Tensor]) -> bool:
        """Whether the file is what writing the part would make."""
        tensors = {**part.tensors, **watched}
        return (
            self.aliases == part.aliases
            and self.marks.keys() == tensors.keys()
            and all(self.marks[name].holds(tensor) for name, tensor in tensors.items())
        )


@dataclass(frozen=True)
class Written:
    """What a save wrote, file by file: a later save of the same model links to it."""

    records: Mapping[str, Record] = field(default_factory=dict)

    def __or__(self, other: Written) -> Written:
        """With what a later save wrote."""
        return Written({**self.records, **other.records})

    def at(self, folder: Path) -> Written:
        """The same, once the folder that it was written to is called so."""
        return Written({f: replace(r, path=folder / f) for f, r in self.records.items()})

    @property
    def sha256(self) -> dict[str, str]:
        return {file: record.sha256 for file, record in self.records.items()}


def write_model(
    folder: Path,
    model: nn.Module,
    config: Mapping[str, Any],
    labels: Sequence[str] = (),
    previous: Written | None = None,
    references: Mapping[int, Mapping[str, Any]] | None = None,
) -> Written:
    """Write a model in format 1 into an empty folder (of ``replacing_folder``).

    A model with an ``nn.ModuleList`` called ``experts``: ``router.safetensors``, a file for each
    expert and the index; any other: ``model.safetensors``. config.json is ``config`` and what says
    that it is this format. labels: the experts', for their files' names. previous: of an earlier
    save of this model object; files that would be the same are hard links to those, copies where
    the system does not link. Fused optimizer updates in between must have been counted. references:
    by the number of an expert, what stands elsewhere: "source", "sha256" of that, and "tensors",
    names that are left out of its file; the index keeps them.

    Raises OSError, TypeError for a state that is no tensor, or of a dtype that safetensors
    does not know, ValueError for other labels.
    """
    bring_home(model.parameters())
    parts, aliases = parts_of(model, labels)
    elsewhere = {name for held in (references or {}).values() for name in held["tensors"]}
    for file, part in parts.items():
        kept = {name: t for name, t in part.tensors.items() if name not in elsewhere}
        parts[file] = replace(part, tensors=kept)
    written = write_parts(folder, parts.values(), previous)
    write_about(folder, config, parts, aliases, written.sha256, references)
    return written


def write_about(
    folder: Path,
    config: Mapping[str, Any],
    parts: Mapping[str, Part],
    aliases: Mapping[str, str],
    sha256: Mapping[str, str],
    references: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Write the index and config.json of a model whose parts are written, by whatever rank.

    parts, aliases: of ``parts_of``; values are not looked at. sha256: of each part's file. config,
    references: see ``write_model``.
    """
    if SINGLE_FILE not in parts:
        _write_json(folder / INDEX_FILE, _index(parts, aliases, sha256, references or {}))
    about = {FORMAT_KEY: FORMAT, "library_name": LIBRARY, **config, "versions": _versions()}
    _write_json(folder / CONFIG_FILE, about)


def write_parts(
    folder: Path,
    parts: Iterable[Part],
    previous: Written | None = None,
    watched: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Written:
    """Write parts into a folder, or link them to the files of a save that they have not changed
    since. watched: by file, tensors that are not written but change whenever the part does."""
    earlier = previous.records if previous else {}
    records = {}
    for part in parts:
        path = folder / part.file
        path.parent.mkdir(exist_ok=True)  # which other ranks may be doing
        beside = (watched or {}).get(part.file, {})
        known = earlier.get(part.file)
        if known is not None and known.holds(part, beside) and _link(known, path):
            records[part.file] = replace(known, path=path)
            release(part.tensors.values())  # buffers were read
            continue
        marks = _marks(part, beside)
        digest = write_tensors(path, part.tensors, part.aliases)
        records[part.file] = Record(path, digest, marks, part.aliases)
        release(part.tensors.values())
    return Written(records)


def remember(saved: SavedModel, model: nn.Module, labels: Sequence[str] = ()) -> Written:
    """What a save would have written to have the model as it is now, which was just loaded from
    there; nothing of a checkpoint that has no hashes, or whose files are called otherwise, nor of
    experts that another rank has."""
    records = {}
    for file, part in parts_of(model, labels)[0].items():
        held = saved.opened.get(file)
        if held is None or held.sha256 is None or set(held.names) != set(part.tensors):
            continue
        if part.elsewhere:
            continue
        records[file] = record(saved.place / file, held, part)
        release(part.tensors.values())
    return Written(records)


def record(
    path: Path, held: TensorFile, part: Part, watched: Mapping[str, Tensor] | None = None
) -> Record:
    """That a file, which has a hash, holds a part as it is now."""
    assert held.sha256 is not None
    return Record(path, held.sha256, _marks(part, watched or {}), held.aliases)


def _marks(part: Part, watched: Mapping[str, Tensor]) -> dict[str, Mark]:
    tensors = {**part.tensors, **watched}
    return {name: Mark.of(tensor, name in part.moving) for name, tensor in tensors.items()}


def _link(known: Record, path: Path) -> bool:
    """Make ``path`` another name of a file that was written; False where that fails, or where
    another file has taken its place: then nothing is left."""
    try:
        os.link(known.path, path)
        if TensorFile(path).sha256 == known.sha256:
            return True
    except Exception:  # another file system, no right to, too many links, or a damaged file
        pass
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return False


def _index(
    parts: Mapping[str, Part],
    aliases: Mapping[str, str],
    sha256: Mapping[str, str],
    references: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    size = sum(t.numel() * t.element_size() for p in parts.values() for t in p.tensors.values())
    return {
        "metadata": {
            "total_size": size,
            FORMAT_KEY: FORMAT,
            "sha256": {file: sha256[file] for file in parts},
            "aliases": dict(aliases),
            "references": {str(i): dict(left_out) for i, left_out in references.items()},
        },
        "weight_map": {name: part.file for part in parts.values() for name in part.tensors},
    }


def _versions() -> dict[str, str]:
    """Of what the model was saved with; a package that runs from its sources has none."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
