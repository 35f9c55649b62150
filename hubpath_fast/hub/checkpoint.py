"""Tensors by name out of the files that tools write: nested, beside an optimizer, in several parts.

Files are read as safetensors or with ``weights_only=True``; code in a pickle is never run. Objects
that a checkpoint holds beside its weights, such as the arguments of the training, are not made: a
stand-in takes the place of their classes, which are not even imported.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import HubError
from .formats import INDEX, SAFETENSORS, kind_of

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX_ENDING = ".index.json"
ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")

# Under which a checkpoint holds its state dict, the first preferred. An average of the weights goes
# before them, as in timm's create_model(checkpoint_path=...).
AVERAGE = re.compile(r"(.+_)?ema(_.+)?")
ENTRIES = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights",
           "params", "module")  # fmt: skip
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loops")
DEPTH = 3  # of entries within entries
DICTS = re.compile(r"(?:dict|CfgNode|Munch|Bunch|Box)$", re.IGNORECASE)
TENSOR_PARTS = re.compile(r"torch\._utils\..*|torch\.\w+Storage|collections\.OrderedDict")
NAMES_IN_MESSAGE = 8


class StandIn(list):
    """What an object beside the weights is read as: it takes any arguments and keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    __hash__ = object.__hash__  # it may be a key


class DictStandIn:
    """The stand-in of a kind of dict: torch fills plain ones alone."""

    def __new__(cls, *args: Any) -> OrderedDict:
        return OrderedDict()


def read_state_dict(path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """A state dict from a file of any ending, on the CPU.

    Args:
        path: a file of safetensors or of ``torch.save``, the index of one in several parts, or a
            folder that holds one of these.
        entry: under which the file holds the state dict, such as "state_dict" or "state.model";
            None: the file's own tensors by name, or else the only ones inside it, an average of the
            weights ("state_dict_ema", "model_ema") before "state_dict", "model", "net", ...

    Raises:
        HubError: the file is missing, broken or of another kind (which), holds nothing but pickled
            objects (which would be run), or tensors by name under several entries.
    """
    path = _file(Path(path))
    content, foreign = _content(path)
    found = dict(_state_dicts(content))
    if entry is not None:
        if entry not in found:
            known = ", ".join(name for name in found if name) or "none"
            raise HubError(
                f"{path} has no tensors by name under {entry!r}; it has them in: {known}"
            )
        return found[entry]
    if not found:
        raise _nothing(path, content, foreign)
    return found[_choice(path, found)]


def weights_files(path: str | Path) -> list[Path]:
    """The files that ``read_state_dict`` reads: one, or an index and what it names. Raises HubError
    as that does."""
    file = _file(Path(path))
    if kind_of(file) != INDEX:
        return [file]
    return [file, *(file.parent / name for name in sorted(set(_weight_map(file).values())))]


def _file(path: Path) -> Path:
    """The file itself, of a folder the one that holds the weights."""
    if not path.is_dir():
        if not path.is_file():
            raise HubError(f"there is no file of weights at {path}")
        return path
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    for name in (SAFE, SAFE + INDEX_ENDING, PICKLED, PICKLED + INDEX_ENDING):
        if name in names:
            return path / name
    files = [n for n in names if n.endswith(INDEX_ENDING)]
    files = files or [n for n in names if n.lower().endswith(ENDINGS)]
    if len(files) == 1:
        return path / files[0]
    if ".metadata" in names:
        raise HubError(
            f"{path} is a folder of torch.distributed.checkpoint; make one file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pth"
        )
    found = f"it holds {_some(files)}; name one" if files else "it holds none"
    raise HubError(f"{path} is a folder; expected a file of weights, and {found}")


def _content(path: Path) -> tuple[Any, list[str]]:
    """What a file holds, and the classes in it that are not read."""
    kind = kind_of(path)
    if kind == INDEX:
        return _shards(path), []
    shard = SHARD.fullmatch(path.name)
    if shard and int(shard[3]) > 1:
        index = path.with_name(shard[1] + shard[4] + INDEX_ENDING)
        if index.is_file():
            raise HubError(
                f"{path} is part {int(shard[2])} of {int(shard[3])}; name {index} instead, or the "
                "folder"
            )
    return _tensors(path, kind)


def _tensors(path: Path, kind: str) -> tuple[Any, list[str]]:
    foreign: list[str] = []
    try:
        if kind == SAFETENSORS:
            from safetensors.torch import load_file

            return load_file(path), foreign
        foreign = sorted(_foreign_classes(path))
        places = [(DictStandIn if DICTS.search(name) else StandIn, name) for name in foreign]
        with warnings.catch_warnings(), torch.serialization.safe_globals(places):
            warnings.simplefilter("ignore")  # torch's on legacy formats
            with open(path, "rb") as file:  # of a path, torch may believe the ending
                return torch.load(file, map_location="cpu", weights_only=True), foreign
    except pickle.UnpicklingError as error:  # what even stand-ins do not make harmless
        raise HubError(
            f"{path} is not a plain file of tensors: it holds other pickled objects"
            f"{f' ({_some(foreign)})' if foreign else ''}, which could run code and are refused, "
            "or is no checkpoint at all. Save its state dict as safetensors instead."
        ) from error
    except Exception as error:  # safetensors' own, zip's and struct's: all mean a broken file
        raise HubError(f"{path} is broken or no file of weights ({error})") from error


def _foreign_classes(path: Path) -> set[str]:
    """Classes and functions named in a checkpoint that are none of torch's own."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except ValueError:  # of torch < 1.6: pickles one after another, the fourth the content
        with open(path, "rb") as file:
            named = {
                arg.replace("__builtin__", "builtins").replace(" ", ".")
                for _ in range(4)
                for opcode, arg, _ in pickletools.genops(file)
                if opcode.name == "GLOBAL"
            }
        return {name for name in named if not TENSOR_PARTS.fullmatch(name)}


def _weight_map(index: Path) -> Mapping[str, str]:
    """Of the index of a checkpoint in several files: the file of each tensor, all of which are
    there."""
    try:
        content = json.loads(index.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise HubError(
            f"{index} is broken or no file of weights: it is no JSON ({error})"
        ) from error
    files = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(files, Mapping) or not all(isinstance(f, str) for f in files.values()):
        raise HubError(
            f"{index} is a JSON file without a weight_map, no weights: name the file of weights, "
            "or the folder that holds it"
        )
    names = sorted(set(files.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise HubError(
            f"{index} names {len(names)} files, and {len(missing)} of them are not beside it: "
            f"{_some(missing)}; fetch them, too"
        )
    return files


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in several files, by its index."""
    files = _weight_map(index)
    names = sorted(set(files.values()))
    state: dict[str, Tensor] = {}
    for name in names:
        part, _ = _tensors(index.parent / name, kind_of(index.parent / name))
        state.update(part)
    absent = sorted(files.keys() - state.keys())
    if absent:
        raise HubError(
            f"{index}: its files lack {len(absent)} tensors that it names: {_some(absent)}"
        )
    return state


def _state_dicts(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict]]:
    """(path, tensors by name) for every dict of tensors; "" is the path of the content itself."""
    if not isinstance(content, Mapping) or depth > DEPTH:
        return
    tensors = {k: v for k, v in content.items() if not str(k).endswith("_extra_state")}
    if tensors and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        yield path, tensors
        return
    for key, value in content.items():
        if isinstance(key, str) and not NOT_WEIGHTS.search(key) and not (depth and "." in key):
            yield from _state_dicts(value, f"{path}.{key}" if path else key, depth + 1)


def _choice(path: Path, found: Mapping[str, Any]) -> str:
    """Which of a file's state dicts is the network's."""
    if len(found) == 1:
        return next(iter(found))
    averages = [name for name in found if any(map(AVERAGE.fullmatch, name.split(".")))]
    if len(averages) == 1:
        return averages[0]
    if not averages:
        for name in ENTRIES:
            if name in found:
                return name
    raise HubError(
        f"{path} holds tensors by name under {_some([*found])}; say which are the network's with "
        "key=, as in file/PATH?arch=NAME&key=" + (averages or [*found])[0]
    )


def _nothing(path: Path, content: Any, foreign: list[str]) -> HubError:
    if foreign:
        return HubError(
            f"{path} holds pickled objects ({_some(foreign)}), which could run code and are "
            "refused, and no tensors by name beside them. Where you trust it, load it with torch "
            "and save its state dict: torch.save(model.state_dict(), 'weights.pth')."
        )
    if not isinstance(content, Mapping) or not content:
        return HubError(f"{path} holds {type(content).__name__}, not tensors by name")
    odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    return HubError(
        f"{path} holds more than tensors by name, for example {odd[0]!r}; a checkpoint needs its "
        'state dict at the top, or under an entry of its own, such as "state_dict" or "model"'
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_IN_MESSAGE])
    rest = len(names) - NAMES_IN_MESSAGE
    return shown if rest <= 0 else f"{shown} and {rest} more"
