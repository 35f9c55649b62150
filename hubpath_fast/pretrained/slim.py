"""Bodies that a saved hub leaves out: frozen ones, equal to the weights that their names stand for.

The index names in their place the source, the SHA-256 of its file, and the tensors. Opening the
hub finds that file as ``create_model`` does, in a cache or by the network, and takes no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import CheckpointError, SavedModel
from ..hub import ExpertSpec, HubError
from ..hub.rebuild import find_model, rebuild_expert
from ..hub.source import HeadTask
from ..hub.weights import WeightSource, fetch_all, file_digest
from ..model import ExpertOrigin, HubPathway
from ..model.heads import head_names
from .saved import SavedHub

# By the number of an expert: {"source": its name, "sha256": of that file, "tensors": names}
References = dict[int, dict[str, Any]]


def find_references(model: HubPathway, task: HeadTask) -> References:
    """What may be left out of a model's files: the body of every expert that is frozen but for its
    head, shares nothing with another part, and is to the bit what its source on this machine has.
    """
    state = model.state_dict()
    shared = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    found: References = {}
    for i, origin in enumerate(model.origin.experts):
        expert, prefix = model.experts[i], f"experts.{i}."
        heads = head_names(expert)
        learns = any(p.requires_grad for n, p in expert.named_parameters() if n not in heads)
        path = None if learns or origin.spec is None else _file_of(origin)
        if path is None:
            continue
        try:
            source = _from_source(origin, task, model.origin.input_size, path)
        except HubError:  # what lies there is no longer what it was
            continue
        body = {prefix + name: there for name, there in source.items() if name not in heads}
        own = all(shared[state[name].untyped_storage().data_ptr()] == 1 for name in body)
        if own and all(_equal(state[name], there) for name, there in body.items()):
            digest = file_digest(path, "sha256")
            found[i] = {"source": origin.spec, "sha256": digest, "tensors": list(body)}
    return found


class Completed:
    """A saved model with the tensors that it leaves out, as ``assign_weights`` reads one."""

    def __init__(self, saved: SavedModel, more: Mapping[str, Tensor]):
        self.saved, self.more, self.folder = saved, more, saved.folder

    def files(self) -> dict[str, Path]:
        return self.saved.files()

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        more = {name: t for name, t in self.more.items() if name.startswith(prefix)}
        return {**self.saved.tensors(prefix), **more}


def complete(hub: SavedHub, experts: Iterable[int], task: HeadTask) -> SavedModel | Completed:
    """A folder's tensors with those that are left out of the files of these experts.

    Raises CheckpointError where a source is not there any more, or holds something else.
    """
    references = {i: r for i, r in hub.references.items() if i in set(experts)}
    if not references:
        return hub.saved
    origins = [hub.experts[i] for i in references]
    paths = _fetch(hub, origins)
    more: dict[str, Tensor] = {}
    for reference, origin, path in zip(references.values(), origins, paths, strict=True):
        found = file_digest(path, "sha256")
        if found != reference["sha256"]:
            raise CheckpointError(
                f"{hub.folder} leaves out the body of {origin.label}, which is that of "
                f"{origin.spec}, but {path} is another file now (SHA-256 {found[:12]}..., expected "
                f"{reference['sha256'][:12]}...); restore it, or save the hub without slim"
            )
        with hub.naming():
            source = _from_source(origin, task, hub.input_size, path)
            more |= {name: source[name.split(".", 2)[2]] for name in reference["tensors"]}
    return Completed(hub.saved, more)


def _file_of(origin: ExpertOrigin) -> Path | None:
    """The file of an expert's weights on this machine; None where there is none, or several."""
    try:
        source = find_model(ExpertSpec.parse(origin.spec), None).weights
    except HubError:
        return None
    path = None if source is None else source.cached()
    return path if path is not None and path.is_file() else None


def _fetch(hub: SavedHub, origins: Sequence[ExpertOrigin]) -> list[Path]:
    sources: list[WeightSource] = []
    for origin in origins:
        why = f"{hub.folder} leaves out the body of {origin.label}, which is that of {origin.spec}"
        try:
            source = find_model(ExpertSpec.parse(origin.spec), None).weights
            problem = source.problem()
        except HubError as error:
            raise CheckpointError(f"{why}, which cannot be had: {_line(error)}") from error
        if problem is not None:
            raise CheckpointError(f"{why}, which cannot be had: {problem}")
        sources.append(source)
    try:
        return fetch_all(sources)
    except HubError as error:
        labels = ", ".join(origin.label for origin in origins)
        raise CheckpointError(
            f"{hub.folder} leaves out the bodies of {labels}, whose weights are not here: "
            f"{_line(error)}; run once with a network, or save the hub without slim"
        ) from error


def _from_source(
    origin: ExpertOrigin, task: HeadTask, input_size: int, path: Path
) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        return rebuild_expert(origin, task, input_size, path).module.state_dict()


def _equal(mine: Tensor, there: Tensor) -> bool:
    return mine.dtype == there.dtype and torch.equal(mine.cpu(), there)


def _line(error: HubError) -> str:
    return str(error).splitlines()[0]
