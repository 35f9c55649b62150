"""Checkpoints of training: a saved model, and ``state.pt``, all else that a run needs to go on.

The optimizer's tensors lie in ``optimizer/`` (see optimizer_files.py). ``state.pt`` holds plain
types and tensors and is read with ``weights_only=True``. How the folder is replaced, and what of
the model lies where, is ``hubpath_fast.checkpoints``.

Several ranks write one folder, which all of them see: each the files of the experts that it has,
the first one all else. What is written is what one process would write of the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import (
    STATE_FILE,
    Part,
    Written,
    parts_of,
    read_file,
    replacing_folder,
    saying_unsaved,
    write_about,
    write_parts,
)
from ..checkpoints.errors import damaged
from ..model.pathway import HubPathway
from ..model.saving import model_config
from ..parallel.ranks import Ranks
from ..resting import bring_home
from .optimizer_files import merge_states, save_optimizer

SAVING = "saving"  # what ranks are doing, for the message of one that fails


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    labels: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
    previous: Written | None = None,
    ranks: Ranks = Ranks(),
) -> Written:
    """Replace the checkpoint in ``folder``; until that is done the previous one stays whole.

    optimizer: one to be kept by its parameters' names, whose updates are counted; the state gets an
    entry "optimizer". labels, previous: as ``write_model`` takes them. ranks: that have the model's
    experts; all call this alike, the first one's state and config are written, and each gets what
    it has written itself. Raises OSError (with the errno, such as ENOSPC) when it cannot be
    written, on all ranks whichever cannot; nothing half-written is left behind.
    """
    bring_home(model.parameters())
    folder, parts, aliases = Path(folder), *parts_of(model, labels)
    with _replacing_together(folder, ranks) as new:
        mine = _own_parts(parts, ranks)
        rest: dict[str, Any] = {}
        with ranks.agreed(SAVING), saying_unsaved(folder):
            written = model_files = write_parts(new, mine.values(), previous)
            if optimizer is not None:
                more, rest = save_optimizer(new, model, optimizer, mine, previous)
                written |= more
        found = ranks.gather((model_files.sha256, rest))
        with ranks.agreed(SAVING), saying_unsaved(folder):
            if ranks.is_first:
                hashes = {file: digest for each, _ in found for file, digest in each.items()}
                write_about(new, config, parts, aliases, hashes)
                if optimizer is not None:
                    state = {**state, "optimizer": merge_states([each for _, each in found])}
                with open(new / STATE_FILE, "wb") as file:
                    torch.save(dict(state), file)
    return written.at(folder)


@contextmanager
def _replacing_together(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """``replacing_folder`` by the first rank, with the same folder to write to on all."""
    with ExitStack() as replaced:
        new = None
        with ranks.agreed(SAVING):
            if ranks.is_first:
                new = replaced.enter_context(replacing_folder(folder))
        yield ranks.gather(new)[0]
        with ranks.agreed(SAVING):
            replaced.close()


def _own_parts(parts: Mapping[str, Part], ranks: Ranks) -> dict[str, Part]:
    """By file, the parts that this rank writes: of those that it has, the ones that no rank before
    it has."""
    here = [file for file, part in parts.items() if not part.elsewhere]
    taken = {file for each in ranks.gather(here, patient=True)[: ranks.rank] for file in each}
    return {file: parts[file] for file in here if file not in taken}


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
