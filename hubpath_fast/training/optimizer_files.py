"""An optimizer's state on disk: by its parameters' names, in a file for each expert.

``optimizer/`` has the files of the model's weights: the state of an expert's parameters lies in a
file of that expert's name, as tensors ``PARAMETER.KEY`` ("experts.0.head.weight.exp_avg"). What is
no tensor, and the settings of the parameter groups, go into ``state.pt``. Checkpoints of format 0
have all of it there, by numbers.

Parameters on the meta device are another rank's: the optimizer has them in its groups, so that
numbers and names are the same on all ranks, and no state for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import (
    CheckpointError,
    Part,
    TensorFile,
    Written,
    parts_of,
    read_file,
    record,
    write_parts,
)
from ..resting import copy_beside, forget, release
from .optimizer import match_layouts

FOLDER = "optimizer"


def count_updates(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have torch's counters of writes in place tell of the optimizer's updates.

    Fused updates, alone of all, do not move them. One parameter of each part of the model that was
    updated is enough, and finding it takes microseconds a step.
    """
    trained = [
        list(owned.values()) for owned in _owned(model, optimizer, parts_of(model)[0]).values()
    ]

    def count(*_: Any) -> None:
        for params in trained:
            for p in params:
                if p.grad is not None:
                    torch.autograd.graph.increment_version(p)
                    break

    optimizer.register_step_post_hook(count)


def save_optimizer(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Mapping[str, Part],
    previous: Written | None = None,
) -> tuple[Written, dict[str, Any]]:
    """Write the tensors of the optimizer's state into a checkpoint's folder; the rest for
    ``state.pt`` (see ``merge_states``).

    parts: of the model, by file; only the state of their parameters is written. The updates since
    ``previous`` must have been counted (``count_updates``).
    """
    packed = optimizer.state_dict()
    parts, watched, plain = _split(model, optimizer, packed["state"], parts)
    written = write_parts(folder, parts, previous, watched)
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in packed["param_groups"]
    ]
    return written, {"param_groups": groups, "values": plain, "files": written.sha256}


def merge_states(rests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``state.pt`` holds of the optimizer, from what ``save_optimizer`` gave each rank."""
    return {
        "param_groups": rests[0]["param_groups"],
        "values": {name: v for rest in rests for name, v in rest["values"].items()},
        "files": {file: digest for rest in rests for file, digest in rest["files"].items()},
    }


def load_optimizer(
    folder: Path,
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    labels: Sequence[str] = (),
) -> Written:
    """Load what ``save_optimizer`` wrote, or a state of format 0, but for what is of parameters on
    the meta device; the files, as it would have written them. The optimizer's groups must be those
    of the run.

    Raises CheckpointError for a file that is missing, damaged, or of another save or model; the
    optimizer is then as it was.
    """
    if "state" in state:  # format 0
        optimizer.load_state_dict(dict(state))
        for p in [p for p in optimizer.state if p.is_meta]:
            del optimizer.state[p]
        match_layouts(optimizer)
        return Written()
    opened = {file: _opened(folder, file, digest) for file, digest in state["files"].items()}
    values: dict[str, dict[str, Any]] = {name: dict(v) for name, v in state["values"].items()}
    numbers = _numbers(model, optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = {name for name, number in numbers.items() if not params[number].is_meta}
    for file, held in opened.items():
        for name in held.names:
            parameter, _, key = name.rpartition(".")
            if parameter not in numbers:
                raise CheckpointError(
                    f"{folder / file} is of another model: no parameter {parameter} is trained"
                )
            if parameter not in own:
                continue
            # Memory of its own: what is mapped would keep the file, which saving replaces.
            owner = params[numbers[parameter]]
            values.setdefault(parameter, {})[key] = copy_beside(owner, held.tensor(name))
        release(params[numbers[name.rpartition(".")[0]]] for name in held.names)
        forget(held.mapped)
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: value for name, value in values.items() if name in own},
            "param_groups": _numbered_groups(state["param_groups"], optimizer),
        }
    )
    match_layouts(optimizer)
    state = optimizer.state_dict()["state"]
    parts, watched, _ = _split(model, optimizer, state, parts_of(model, labels)[0])
    return Written(
        {
            part.file: record(folder / part.file, opened[part.file], part, watched[part.file])
            for part in parts
            if part.file in opened and set(opened[part.file].names) == set(part.tensors)
        }
    )


def _split(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[int, Mapping[str, Any]],
    of_model: Mapping[str, Part],
) -> tuple[list[Part], dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """The state's tensors by file, where there are any; by file, the parameters that change with
    them; and by parameter what is no tensor. state: by the parameters' numbers. of_model: parts."""
    parts, watched, plain = [], {}, {}
    numbers = _numbers(model, optimizer)
    for file, owned in _owned(model, optimizer, of_model).items():
        tensors: dict[str, Tensor] = {}
        for name in owned:
            for key, value in state.get(numbers.get(name, -1), {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}"] = value
                else:
                    plain.setdefault(name, {})[key] = value
        if tensors:
            place = f"{FOLDER}/{Path(file).name}"
            parts.append(Part(place, tensors))
            watched[place] = dict(owned)
    return parts, watched, plain


def _owned(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, Part]
) -> dict[str, dict[str, nn.Parameter]]:
    """By the model's files, the optimizer's parameters by name, each in one file, once: those too
    that are frozen for now, whose state waits for them."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters(remove_duplicate=False))
    return {
        file: {n: named[n] for n in part.tensors if n in named and id(named[n]) in held}
        for file, part in parts.items()
    }


def _numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """By a parameter's name, as in the files, its number in the optimizer's ``state_dict``."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {id(p): number for number, p in enumerate(params)}
    owned = _owned(model, optimizer, parts_of(model)[0])
    return {
        name: numbers[id(p)]
        for own in owned.values()
        for name, p in own.items()
        if id(p) in numbers
    }


def _numbered_groups(
    saved: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """The saved groups, with the numbers of the parameters that this optimizer has in them."""
    groups, start = [], 0
    for settings, group in zip(saved, optimizer.param_groups, strict=True):
        stop = start + len(group["params"])
        groups.append({**settings, "params": list(range(start, stop))})
        start = stop
    return groups


def _opened(folder: Path, file: str, digest: str) -> TensorFile:
    opened = read_file(folder, file, TensorFile)
    if opened.sha256 != digest:
        raise CheckpointError(
            f"{folder / file} is the file of another save: the SHA-256 in its header is not the "
            f"one in state.pt; restore {folder} from a copy"
        )
    return opened
