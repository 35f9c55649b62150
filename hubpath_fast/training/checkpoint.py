"""Checkpoints of training: a saved model, and ``state.pt``, all else that a run needs to go on.

The optimizer's tensors lie in ``optimizer/`` (see optimizer_files.py). ``state.pt`` holds plain
types and tensors and is read with ``weights_only=True``. How the folder is replaced, and what of
the model lies where, is ``hubpath_fast.checkpoints``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import STATE_FILE, Written, read_file, replacing_folder, write_model
from ..checkpoints.errors import damaged
from ..model.pathway import HubPathway
from ..model.saving import model_config
from .optimizer_files import save_optimizer


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    labels: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
    previous: Written | None = None,
) -> Written:
    """Replace the checkpoint in ``folder``; until that is done the previous one stays whole.

    optimizer: one to be kept by its parameters' names, whose updates are counted; the state gets an
    entry "optimizer". labels, previous: as ``write_model`` takes them. Raises OSError (with the
    errno, such as ENOSPC) when it cannot be written; nothing half-written is left behind.
    """
    with replacing_folder(folder) as new:
        written = write_model(new, model, config, labels, previous)
        if optimizer is not None:
            more, rest = save_optimizer(new, model, optimizer, labels, previous)
            written, state = written | more, {**state, "optimizer": rest}
        with open(new / STATE_FILE, "wb") as file:
            torch.save(dict(state), file)
    return written.at(Path(folder))


def load_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's ``state.pt`` onto the CPU, without unpickling anything but plain data."""
    # mmap would keep the file open under a later rename on some systems; states are small.
    state = read_file(
        folder, STATE_FILE, partial(torch.load, map_location="cpu", weights_only=True)
    )
    if not isinstance(state, dict):
        raise damaged(Path(folder) / STATE_FILE)
    return state


def model_entries(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a Hub-Pathway, so that it can be opened without the run."""
    return model_config(model) if isinstance(model, HubPathway) else {}


def expert_labels(model: nn.Module, names: Sequence[str] | None) -> Sequence[str]:
    """What the experts' files are called. names: by default, of a model that has none itself."""
    if isinstance(model, HubPathway):
        return model.origin.labels
    return (names or ()) if hasattr(model, "experts") else ()
