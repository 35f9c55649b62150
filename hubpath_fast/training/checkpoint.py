"""Checkpoints that are whole or absent: written to a temporary folder, synced, renamed.

A checkpoint is a folder: ``model.safetensors`` (parameters and buffers), ``state.pt`` (all else
that a run needs to go on: plain types and tensors, read with ``weights_only=True``) and
``config.json``. Saving over ``last/`` writes ``.last.new/``, moves ``last/`` to ``.last.old/`` and
``.last.new/`` to ``last/``: one of ``last/`` and ``.last.old/`` is whole at every moment, and
readers look for both; one that was overtaken by a save reads again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import sync

MODEL_FILE, STATE_FILE, CONFIG_FILE = "model.safetensors", "state.pt", "config.json"
T = TypeVar("T")
READS = 100  # of a checkpoint that a running trainer replaces meanwhile
RENAME_SECONDS = 10.0  # that a reader may keep a folder from being renamed, where it can
ALIASES = "aliases"  # in the safetensors' metadata: JSON of {name: name of the same tensor}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model or configuration."""


def save_checkpoint(
    folder: Path, model: nn.Module, state: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Replace the checkpoint in ``folder``; until that is done the previous one stays whole.

    Raises OSError (with the errno, such as ENOSPC) when it cannot be written; nothing half-written
    is left behind.
    """
    folder = Path(folder)
    new, old = _temporary(folder, "new"), _temporary(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        tensors, aliases = _flat_tensors(model.state_dict())
        save_file(tensors, new / MODEL_FILE, metadata={ALIASES: json.dumps(aliases)})
        with open(new / STATE_FILE, "wb") as file:
            torch.save(dict(state), file)
        # safetensors makes files that are the user's alone; this one is as the umask says.
        shutil.copymode(new / STATE_FILE, new / MODEL_FILE)
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (MODEL_FILE, STATE_FILE, CONFIG_FILE):
            sync(new / name)
        sync(new)
        if folder.exists():
            _rename(folder, old)
        _rename(new, folder)
        sync(folder.parent)
    except BaseException as error:
        _recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        number = _errno(error)
        if number is None:
            raise
        kept = "the previous checkpoint is whole" if folder.exists() else "there is no earlier one"
        hint = ""
        if number == errno.ENOSPC:
            free = shutil.disk_usage(folder.parent).free / 2**20
            hint = f" ({free:.0f} MiB free); make room and resume"
        raise OSError(
            number, f"cannot save: {os.strerror(number)}{hint}; {kept}", str(folder)
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """Where the checkpoint lies: ``folder``, its predecessor if a save was cut short, or None."""
    return next((p for p in (Path(folder), _temporary(Path(folder), "old")) if p.is_dir()), None)


def discard_unfinished(folder: Path) -> None:
    """Clears away what a save left that was cut short. Only where nothing else saves."""
    _recover(Path(folder))
    shutil.rmtree(_temporary(Path(folder), "new"), ignore_errors=True)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's parameters and buffers into ``model``, in place.

    Raises CheckpointError naming what is damaged, missing, superfluous or of another shape.
    """
    tensors = _read(folder, MODEL_FILE, _named_tensors)
    path, own = _existing(folder) / MODEL_FILE, model.state_dict()
    for name in sorted({*own, *tensors}):
        if name not in tensors or name not in own:
            where = "the model, not in the file" if name in own else "the file, not in the model"
            raise CheckpointError(f"{path} is of another model: {name} is in {where}")
        mine, saved = own[name], tensors[name]
        if mine.shape != saved.shape or mine.dtype != saved.dtype:
            raise CheckpointError(
                f"{path} is of another model: {name} is {_describe(saved)} in the file, "
                f"{_describe(mine)} in the model"
            )
    model.load_state_dict(tensors)


def load_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's ``state.pt`` onto the CPU, without unpickling anything but plain data."""
    # mmap would keep the file open under a later rename on some systems; states are small.
    state = _read(folder, STATE_FILE, partial(torch.load, map_location="cpu", weights_only=True))
    if not isinstance(state, dict):
        raise _damaged(_existing(folder) / STATE_FILE)
    return state


def load_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``."""
    return _read(folder, CONFIG_FILE, lambda path: json.loads(path.read_text(encoding="utf-8")))


def _read(folder: Path, name: str, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of one of a checkpoint's files."""
    for _ in range(READS):
        version = _version(folder)
        try:
            return read(_existing(folder) / name)
        except Exception as error:  # torch: RuntimeError, EOFError, KeyError or UnpicklingError
            if version == _version(folder):  # else a run has saved meanwhile
                raise _explained(error, folder, name) from error
    raise CheckpointError(f"{folder} is replaced again and again while it is read; try again")


def _explained(error: Exception, folder: Path, name: str) -> CheckpointError:
    """What a user can do about an error from reading one of a checkpoint's files."""
    if isinstance(error, CheckpointError):
        return error
    path, number = _existing(folder) / name, _errno(error)
    if not path.exists():
        return CheckpointError(f"{path} is missing; the checkpoint is not whole")
    if number is not None:
        return CheckpointError(f"{path} cannot be read: {os.strerror(number)}")
    return _damaged(path, "" if name == STATE_FILE else str(error))


def _damaged(path: Path, reason: str = "") -> CheckpointError:
    """reason: of those that read it; torch's is about its own insides."""
    reason = f" ({reason.splitlines()[0]})" if reason else ""
    return CheckpointError(
        f"{path} is truncated or damaged{reason}; restore {path.parent} from a copy, or delete it "
        "and resume, which makes it again"
    )


def _version(folder: Path) -> tuple[int, int] | None:
    """Tells the checkpoints apart that were in a folder one after the other."""
    with contextlib.suppress(OSError):
        status = (find_checkpoint(folder) or folder).stat()
        return status.st_ino, status.st_ctime_ns
    return None


def _named_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        aliases = json.loads((file.metadata() or {}).get(ALIASES, "{}"))
    return tensors | {name: tensors[kept] for name, kept in aliases.items()}


def _flat_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What safetensors can hold: contiguous tensors that share no memory; and the names of those
    that are another one, with its name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the model's state_dict holds {name}, a {type(value).__name__}: only tensors can "
                "be saved; keep it out of get_extra_state()"
            )
        value = value.detach()
        storage = value.untyped_storage().data_ptr()
        key = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if storage and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensor = value.cpu().contiguous()
        # A view of memory that another entry has too gets memory of its own.
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors, aliases


def _existing(folder: Path) -> Path:
    found = find_checkpoint(folder)
    if found is None:
        raise CheckpointError(f"there is no checkpoint at {folder}")
    return found


def _temporary(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _recover(folder: Path) -> None:
    """Undo a save that was cut short between its two renames, or finish tidying after one."""
    old = _temporary(folder, "old")
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _rename(folder: Path, to: Path) -> None:
    """``os.replace``, which on Windows has to wait while another process reads a file in it."""
    until = time.monotonic() + (RENAME_SECONDS if os.name == "nt" else 0)
    while True:
        try:
            return os.replace(folder, to)
        except PermissionError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)


def _errno(error: BaseException) -> int | None:
    """The operating system's error behind ``error``: torch and safetensors wrap it in their own."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError):
            return chain.errno or errno.EIO
        found = re.search(r"os error (\d+)", str(chain))
        if found and isinstance(chain, SafetensorError):
            return int(found.group(1))
        chain = chain.__cause__ or chain.__context__
    return None


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
