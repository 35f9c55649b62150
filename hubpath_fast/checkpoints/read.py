"""A saved model as its folder holds it: opened and checked without reading the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from .errors import CheckpointError, damaged, unreadable
from .folders import while_it_stands
from .layout import (
    CONFIG_FILE,
    EXPERTS,
    FORMAT,
    INDEX_FILE,
    ROUTER_FILE,
    SINGLE_FILE,
    STATE_FILE,
)
from .tensor_file import TensorFile, data_sha256

T = TypeVar("T")
FORMAT_KEY = "hubpath_format"
FILE_NAME = re.compile(rf"({EXPERTS}/)?[A-Za-z0-9][A-Za-z0-9._+-]*\.safetensors")


class SavedModel:
    """A folder with a model's weights, of any format, open.

    prefix: of the names that are wanted; of a model in several files, those without any of them are
    not opened, and need not be there.

    Its tensors are the files' memory, mapped, also when another save has taken the folder's place.

    Attributes:
        folder: as given.
        format: 0 or 1.
        config: what config.json holds.
        names: of all tensors, those included that are another one.
        place: where the folder was when it was opened (a save may have been cut short).
        opened: its files of weights by their names in the folder.
        references: by the number of an expert, what is left out of its file: see ``write_model``.

    Raises:
        CheckpointError: what is missing, truncated, of another save, of a newer format, or no
            checkpoint of this package. The weights' own bytes are looked at by ``verify`` alone.
    """

    def __init__(self, folder: str | Path, prefix: str = "") -> None:
        self.folder, self._prefix = Path(folder), prefix
        while_it_stands(self.folder, self._open)

    def files(self) -> dict[str, Path]:
        """The file of each tensor; where two names are one tensor, the file that holds it."""
        return {name: self.place / self._where[self._kept(name)] for name in self.names}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names begin so, on the CPU; one tensor under all its names."""
        names = [name for name in self.names if name.startswith(prefix)]
        kept = {}
        for name in map(self._kept, names):
            if name not in kept:
                kept[name] = self.opened[self._where[name]].tensor(name)
        return {name: kept[self._kept(name)] for name in names}

    def verify(self) -> None:
        """Read all bytes; CheckpointError names the file whose data are not what was written.

        Files of format 0 tell no hash: of those, nothing can be said.
        """
        for file, opened in self.opened.items():
            path = self.place / file
            found = read_file(self.folder, file, data_sha256)
            if opened.sha256 is not None and found != opened.sha256:
                raise CheckpointError(
                    f"{path} is damaged: the SHA-256 of its data is {found[:12]}..., and "
                    f"{opened.sha256[:12]}... was written; restore it from a copy"
                )

    def _kept(self, name: str) -> str:
        return self._aliases.get(name, name)

    def _open(self, place: Path) -> None:
        self.place = place
        self.config: dict[str, Any] = _read(place / CONFIG_FILE, _json)
        self.format = _format(place, self.config)
        index = place / INDEX_FILE
        if self.format == 0 or not (index.exists() or _is_in_parts(place)):
            files, self._aliases = {SINGLE_FILE: None}, {}
            self.references: dict[int, dict[str, Any]] = {}
        else:
            files, where, aliases, self.references = _index(index)
            names = [name for name in (*where, *aliases) if name.startswith(self._prefix)]
            wanted = {where[aliases.get(name, name)] for name in names} or set(files)
            files = {file: digest for file, digest in files.items() if file in wanted}
            where = {name: file for name, file in where.items() if file in wanted}
            self._aliases = {name: kept for name, kept in aliases.items() if kept in where}
        self.opened = {file: _read(place / file, TensorFile) for file in files}
        for file, digest in files.items():
            _check_hash(place / file, self.opened[file].sha256, digest)
        self._where = {name: file for file, o in self.opened.items() for name in o.names}
        if self.format == 0 or SINGLE_FILE in files:
            self._aliases = dict(self.opened[SINGLE_FILE].aliases)
            self.names = (*self._where, *self._aliases)
        else:
            _check_names(index, where, self._where)
            self.names = (*where, *self._aliases)


def load_config(folder: str | Path) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``. Raises CheckpointError."""
    return read_file(folder, CONFIG_FILE, _json)


def read_file(folder: str | Path, name: str, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of one of a checkpoint's files, though a run may save meanwhile.

    Raises CheckpointError in place of whatever ``read`` raises.
    """
    return while_it_stands(Path(folder), lambda place: _read(place / name, read))


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except Exception as error:  # torch: RuntimeError, EOFError, KeyError or UnpicklingError
        raise unreadable(error, path) from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _format(place: Path, config: dict[str, Any]) -> int:
    if not isinstance(config, dict):
        raise damaged(place / CONFIG_FILE, "it is no object")
    found = config.get(FORMAT_KEY)
    if found is None:
        if (place / STATE_FILE).exists():
            return 0
        raise CheckpointError(
            f"{place} is not a model that hubpath_fast saved: its {CONFIG_FILE} has no "
            f"{FORMAT_KEY}; a plain timm model is a model of a hub, not a hub"
        )
    if type(found) is not int or found < 1:
        raise damaged(place / CONFIG_FILE, f"{FORMAT_KEY} {found!r} is no number from 1 on")
    if found > FORMAT:
        raise CheckpointError(
            f"{place} is of format {found}, and this hubpath_fast reads formats 0 to {FORMAT}; "
            "open it with a newer hubpath_fast"
        )
    return found


def _is_in_parts(place: Path) -> bool:
    return (place / ROUTER_FILE).exists() or (place / EXPERTS).is_dir()


def _index(path: Path) -> tuple[dict, dict, dict, dict]:
    """Of an index: the files with their hashes, the file of each name, the aliases, and what is
    left out."""
    found = _read(path, _json)
    try:
        where, metadata = found["weight_map"], found["metadata"]
        files, aliases = metadata["sha256"], metadata["aliases"]
        references = {int(i): r for i, r in metadata.get("references", {}).items()}
        texts = [*where, *where.values(), *files, *files.values(), *aliases, *aliases.values()]
        for left_out in references.values():
            texts += [left_out["source"], left_out["sha256"], *left_out["tensors"]]
        whole = all(isinstance(text, str) for text in texts)
        whole &= set(where.values()) <= set(files) and set(aliases.values()) <= set(where)
        whole &= not set(aliases) & set(where)
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise damaged(path, "it is no index of a model's files")
    for file in files:
        if not FILE_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path} names the file {file!r}, which is none of this folder: expected "
                f"{ROUTER_FILE} or {EXPERTS}/NAME.safetensors"
            )
    return files, where, aliases, references


def _check_hash(path: Path, header: str | None, index: str | None) -> None:
    """index: what the hash is to be; None where no index says."""
    if index is not None and header != index:
        there = "no SHA-256" if header is None else f"SHA-256 {header[:12]}..."
        raise CheckpointError(
            f"{path} is the file of another save or model: its header says {there}, and "
            f"{INDEX_FILE} expects {index[:12]}...; restore the folder from a copy"
        )


def _check_names(path: Path, index: dict[str, str], files: dict[str, str]) -> None:
    for name in sorted({*index, *files}):
        if index.get(name) != files.get(name):
            raise CheckpointError(
                f"{path} is not of the files beside it: {name} is in "
                f"{index.get(name, 'no file')} by the index, in {files.get(name, 'none')} in fact; "
                "restore the folder from a copy"
            )
