"""A saved model's tensors into a module: copied into its own, or put in their place."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..resting import forget, release
from .errors import CheckpointError
from .layout import EXPERTS
from .read import SavedModel
from .tensor_file import ALIGNMENT

OF_EXPERT = re.compile(rf"{EXPERTS}\.\d+\.")


def load_weights(model: nn.Module, folder: str | Path) -> SavedModel:
    """Load a checkpoint's parameters and buffers into ``model``, in place; the checkpoint.

    What is on the meta device, of experts that another rank has, stays there: only its names and
    shapes are checked.

    Raises CheckpointError naming what is damaged, missing, superfluous or of another shape; the
    model is then as it was.
    """
    saved = SavedModel(folder)
    tensors = saved.tensors()
    own = model.state_dict()
    _check_same(saved, own, tensors)
    _check_ties(saved, {n: t for n, t in _state(model).items() if not t.is_meta}, tensors)
    _copy(model, saved, {n: t for n, t in tensors.items() if not own[n].is_meta})
    return saved


def _copy(model: nn.Module, saved: SavedModel, tensors: Mapping[str, Tensor]) -> None:
    """Part by part, so that of experts that rest in files not all are in memory at once."""
    files, own = saved.files(), model.state_dict()
    opened = {saved.place / name: file for name, file in saved.opened.items()}
    parts: dict[tuple[str, Path], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = OF_EXPERT.match(name)
        prefix = found[0] if found else ""
        parts.setdefault((prefix, files[name]), {})[name[len(prefix) :]] = tensor
    for (prefix, path), part in parts.items():
        module, state = model.get_submodule(prefix[:-1]), OrderedDict(part)
        # Without versions, every BatchNorm whose counter is not of this part gets one put in.
        state._metadata = module.state_dict()._metadata
        module.load_state_dict(state, strict=False)  # names were checked
        release(own[prefix + name] for name in part)
        forget(opened[path].mapped)


def assign_weights(
    model: nn.Module,
    saved: SavedModel,
    prefix: str = "",
    placed: Callable[[str], None] | None = None,
) -> None:
    """Put a saved model's tensors in place of the model's, which may be on ``meta``.

    prefix: of the names in the file, of a model that is a part of the saved one. Those on the CPU
    and on ``meta`` become the file's mapped memory, which nobody has read yet; others are copied to
    their device. Names that were one tensor when it was saved are one parameter again, and what is
    one in the model stays one. ``requires_grad`` and the memory format are the model's; where that
    is not contiguous (channels_last), the tensor is a copy. Buffers that no checkpoint holds
    (``persistent=False``) stay as they are. placed: called with the name of each tensor in the
    model, once it is there. Raises CheckpointError as ``load_weights`` does.
    """
    tensors = {name[len(prefix) :]: t for name, t in saved.tensors(prefix).items()}
    state = _state(model)
    own = {name: state[name] for name in model.state_dict()}
    _check_same(saved, own, tensors, prefix)
    _check_ties(saved, own, tensors, prefix)
    made: dict[int, Tensor] = {}
    for name, mine in own.items():
        known = made.get(id(mine), made.get(id(tensors[name])))
        if known is None:
            known = _in_place_of(mine, tensors[name])
        made[id(mine)] = made[id(tensors[name])] = known
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, known)
        if placed is not None:
            placed(name)


def _in_place_of(mine: Tensor, saved: Tensor) -> Tensor:
    """The saved tensor, as what it replaces is: a parameter, of its layout, on its device."""
    strides = zip(mine.shape, mine.stride(), saved.stride(), strict=True)
    if all(size <= 1 or own == there for size, own, there in strides):
        saved = saved.as_strided(mine.shape, mine.stride())  # a 1 x 1 kernel is of both layouts
        if saved.data_ptr() % ALIGNMENT:  # where predictions could differ in their last bit
            saved = saved.clone()
    else:
        copy = torch.empty_strided(mine.shape, mine.stride(), dtype=saved.dtype)
        saved = copy.copy_(saved)
    if mine.device.type not in ("meta", "cpu"):
        saved = saved.to(mine.device)
    if isinstance(mine, nn.Parameter):
        return nn.Parameter(saved, requires_grad=mine.requires_grad)
    return saved


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under all of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _check_ties(
    saved: SavedModel, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str = ""
) -> None:
    """Names that are one tensor in the model must be of one value in the file."""
    first: dict[int, str] = {}
    for name in sorted(own.keys() & tensors.keys()):
        known = first.setdefault(id(own[name]), name)
        one, two = tensors[known], tensors[name]
        if one is not two and not torch.equal(_bytes(one), _bytes(two)):
            raise CheckpointError(
                f"{_path(saved, prefix + name)} is of another model: {prefix + known} and "
                f"{prefix + name} are one tensor in the model, and differ in the file"
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _check_same(
    saved: SavedModel, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str = ""
) -> None:
    for name in sorted({*own, *tensors}):
        if name not in tensors or name not in own:
            where = "the model, not in the file" if name in own else "the file, not in the model"
            path = _path(saved, prefix + name)
            raise CheckpointError(f"{path} is of another model: {name} is in {where}")
        mine, there = own[name], tensors[name]
        if mine.shape != there.shape or mine.dtype != there.dtype:
            raise CheckpointError(
                f"{_path(saved, prefix + name)} is of another model: {name} is {_describe(there)} "
                f"in the file, {_describe(mine)} in the model"
            )


def _path(saved: SavedModel, name: str) -> Path:
    """The file that holds a tensor, or the folder where none does."""
    return saved.files().get(name, saved.folder)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
