"""A saved hub as it lies in its folder: what it is, before anything of it is built."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints import CONFIG_FILE, CheckpointError, SavedModel
from ..checkpoints.read import FORMAT_KEY
from ..checkpoints.write import LIBRARY
from ..hub import HubError
from ..model import ExpertOrigin, Origin
from ..model.description import expert_origins
from ..written import described, find_written

CARD_FILE = "README.md"
WRITERS = "give one that model.save_pretrained or `hubpath save` wrote, or RUN/best of a run"


class SavedHub:
    """A folder of ``save_pretrained``, or a checkpoint of a run in the same format.

    config: what ``config.json`` says. model: of it, what ``describe`` said of the model. saved: the
    weights, mapped into memory. expert: the only one that is wanted; other files need not be there.

    Raises:
        CheckpointError: the folder is missing or empty, holds something else (a run, a plain model
            of timm), is of a newer or an older format, or misses files or holds others than its
            index says.
    """

    def __init__(self, folder: str | Path, expert: int | str | None = None):
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        self.model: Mapping[str, Any] = self.config["model"]
        prefix = "" if expert is None else f"experts.{self.index_of(expert)}."
        self.saved = SavedModel(self.folder, prefix)

    @cached_property
    def origin(self) -> Origin:
        with self.naming():
            names = ("input_size", "router", "task")
            return Origin(expert_origins(self.model), **{name: self.model[name] for name in names})

    @property
    def experts(self) -> tuple[ExpertOrigin, ...]:
        return self.origin.experts

    @property
    def references(self) -> dict[int, dict[str, Any]]:
        """What the files leave out; see ``slim``."""
        return self.saved.references

    @property
    def input_size(self) -> int | None:
        return self.origin.input_size

    def index_of(self, which: int | str) -> int:
        """The number of an expert, by that or by its label; ValueError where there is none."""
        labels = self.origin.labels
        if isinstance(which, str) and which in labels:
            return labels.index(which)
        if type(which) is int and -len(labels) <= which < len(labels):
            return which % len(labels)
        raise ValueError(
            f"expert: expected a number in 0..{len(labels) - 1} or one of {', '.join(labels)}, "
            f"got {which!r}"
        )

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """What is wrong within is wrong in ``config.json``."""
        path = self.folder / CONFIG_FILE
        try:
            yield
        except CheckpointError:
            raise
        except HubError as error:
            raise CheckpointError(f"{path} names what cannot be built here: {error}") from error
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else repr(error)
            raise CheckpointError(f"{path} does not describe a hub ({what})") from error
        except ValueError as error:
            raise CheckpointError(f"{path} does not describe a hub ({error})") from error


def is_saved_hub(folder: str | Path) -> bool:
    """Whether a folder says that it holds one, whatever else may be wrong with it."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
        keys = ("model", dict), (FORMAT_KEY, int)
        found = isinstance(config, dict) and config.get("library_name") == LIBRARY
        return found and all(isinstance(config.get(key), kind) for key, kind in keys)
    return False


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; {WRITERS}")
    if not path.is_file():
        other = find_written(folder)
        what = f"no saved hub (no {CONFIG_FILE})" if other is None else other.what
        raise CheckpointError(f"{folder} holds {what}; {WRITERS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    found = config if isinstance(config, dict) else {}
    if isinstance(found.get("architecture"), str):
        raise CheckpointError(
            f"{folder} holds a plain model of timm, {found['architecture']}, and no hub; name it "
            f"as an expert of one, local-dir:{folder}"
        )
    if not isinstance(found.get("model"), dict):
        if "atari" in found:
            raise CheckpointError(described(folder) or f"{folder} holds a policy; {WRITERS}")
        old = " of an earlier version, which do not say what they are the weights of" * (
            "trainer" in found
        )
        what = "weights" if old else "no saved hub"
        way = "open its run, `hubpath save RUN DIR`" if old else WRITERS
        raise CheckpointError(f"{folder} holds {what}{old}; {way}")
    return found
