"""A saved hub opened again, whole or one expert of it.

Experts are built from their names without memory for their parameters, and the files, mapped into
memory, take their place: what is read is what is used. Nothing is unpickled, and where anything is
wrong nothing is loaded, a user's own modules included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import CheckpointError, SavedModel, assign_weights
from ..checkpoints.layout import EXPERTS
from ..devices import check_device
from ..executors import ResidentExecutor
from ..hub.expert import Expert
from ..hub.rebuild import rebuild_aggregator, rebuild_expert, rebuild_generator
from ..hub.source import HeadTask
from ..model import HubPathway, RoutingPolicy
from .saved import SavedHub
from .slim import Completed, complete

GENERATOR, AGGREGATOR = "generator", "aggregator"
Modules = Mapping[int | str, nn.Module]


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    device: str = "cpu",
    modules: Modules | None = None,
    room: int | str | None = None,
) -> HubPathway:
    """A model that ``save_pretrained`` or ``hubpath save`` wrote, in evaluation mode.

    Args:
        source: a folder, or of the Hugging Face hub "OWNER/NAME"; see ``hub_api.locate``.
        revision, cache_dir, token, local_files_only: of a Hub id, as huggingface_hub has them.
        device: where its weights go.
        modules: what no name builds, by what it is in the model: {0: expert, "generator": module,
            "aggregator": module}. Their weights are loaded, in place of those they have. An expert
            is what ``model.experts`` held, a wrapper around it included.
        room: what experts may take in memory, as of ``HubPathway``; None: all of them are read.
            With it the executor is "resident": experts rest in the folder's files, which are to
            stay as they are, and what is trained in scratch files; of a CUDA device's, in the
            host's memory.

    Raises:
        CheckpointError: the folder holds no hub, one of a newer version, or one whose files are
            missing, damaged, swapped or of another model; names that this installation cannot
            build.
        ValueError: modules that are needed and missing, with the list; a device that is none; a
            room that is none, or too small, or on another device.
    """
    on = check_device(device)
    if room is not None and on.type not in ("cpu", "cuda"):
        raise ValueError(f"room: is for a CPU or CUDA, got room={room!r} with device={device!r}")
    where = {"revision": revision, "cache_dir": cache_dir, "token": token}
    hub = SavedHub(find_folder(source, local_files_only=local_files_only, **where))
    model = open_model(hub, modules, room).to(on)
    if room is not None:
        model.executor.settle(model.experts)
    return model


def load_expert(
    source: str | Path,
    which: int | str,
    device: str = "cpu",
    *,
    module: nn.Module | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """One expert of a saved hub, in evaluation mode: normalised images [n, 3, S, S] -> [n, C, ...].

    Of a folder its file alone is opened; of a repository it alone is downloaded.

    Args:
        source, device, and those of a Hub id: as of ``from_pretrained``.
        which: its number, or its label in the hub's tables.
        module: what it is, where no name builds it.

    Raises:
        CheckpointError, ValueError: as of ``from_pretrained``; no such expert.
    """
    on = check_device(device)
    where = {"revision": revision, "cache_dir": cache_dir, "token": token}
    folder = find_folder(source, local_files_only=local_files_only, expert=which, **where)
    hub = SavedHub(folder, which)
    index = hub.index_of(which)
    given = {} if module is None else {index: module}
    _check_modules(given, _needed(hub, experts=(index,)), "module", hub)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        expert = _expert(hub, index, given)
        assign_weights(expert.module, _tensors(hub, (index,)), f"experts.{index}.")
    return expert.module.to(on).eval()


def find_folder(source: str | Path, *, expert: int | str | None = None, **where) -> Path:
    """See ``hub_api.locate``."""
    from .hub_api import locate

    return locate(source, expert=expert, **where)


def open_model(
    hub: SavedHub, modules: Modules | None = None, room: int | str | None = None
) -> HubPathway:
    """The model of a folder, on the CPU and in evaluation mode."""
    given = dict(modules or {})
    _check_modules(given, _needed(hub), "modules", hub)
    # New layers draw their first weights, for nothing; and what is opened may be trained.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        executor = None if room is None else ResidentExecutor(room)
        model = _build(hub, given)
        if executor is not None:
            executor.check(model.experts, model.k)
            model.executor = executor
        tensors = _tensors(hub, range(len(hub.experts)))
        if room is None:
            assign_weights(model, tensors)
        else:
            _assign_resting(model, tensors, hub.saved)
    return model.eval()


def _assign_resting(model: HubPathway, tensors: SavedModel | Completed, saved: SavedModel) -> None:
    """Each expert rests as soon as it has its weights: those of another memory format are copies,
    and not all of them fit in memory."""
    opened = {saved.place / name: file for name, file in saved.opened.items()}
    paths: list[set[Path]] = [set() for _ in model.experts]
    for name, path in saved.files().items():
        if (index := _expert_of(name)) is not None:
            paths[index].add(path)
    done = 0

    def settle(until: int) -> None:
        nonlocal done
        while done < until:
            files = [opened[path].mapped() for path in sorted(paths[done])]
            model.executor.settle_one(model.experts, done, [f for f in files if f is not None])
            done += 1

    def placed(name: str) -> None:
        if (index := _expert_of(name)) is not None:  # they come in their order
            settle(index)

    assign_weights(model, tensors, placed=placed)
    settle(len(paths))
    model.executor.settle(model.experts)


def _expert_of(name: str) -> int | None:
    """The number of the expert that a tensor is of."""
    return int(name.split(".", 2)[1]) if name.startswith(f"{EXPERTS}.") else None


def _build(hub: SavedHub, given: Modules) -> HubPathway:
    """The model without its weights."""
    described = hub.model
    with hub.naming():
        experts = [_expert(hub, index, given) for index in range(len(hub.experts))]
        generator = given.get(GENERATOR)
        if generator is None:
            router, size = hub.origin.router, hub.origin.input_size
            generator = rebuild_generator(described["generator"], router, experts, size)
        aggregator = given.get(AGGREGATOR)
        if aggregator is None:
            sizes = len(experts), described["num_outputs"]
            aggregator = rebuild_aggregator(described["aggregator"], *sizes)
        model = HubPathway(
            [expert.module for expert in experts],
            generator,
            aggregator,
            **{name: described[name] for name in ("k", "num_outputs", "min_group", "renormalize")},
            normalization=_normalization(hub, described["normalized"]),
        )
        model.origin = hub.origin
        if described.get("policy") is not None:  # which the earliest folders do not know
            model.policy = RoutingPolicy.from_dict(described["policy"])
            model.policy.check(model.k, len(experts))
        parts = {i: (f"experts.{i}.", expert) for i, expert in enumerate(model.experts)}
        parts |= {name: (f"{name}.", getattr(model, name)) for name in (GENERATOR, AGGREGATOR)}
        for key, (prefix, part) in parts.items():
            if key not in given:
                _cast(part, hub.saved, prefix)
        own = [prefix for key, (prefix, _) in parts.items() if key in given]
        _freeze(model, described.get("frozen"), own)
        if described["channels_last"]:
            model.to(memory_format=torch.channels_last)
    return model


def _expert(hub: SavedHub, index: int, given: Modules) -> Expert:
    """One expert, without weights."""
    origin, described = hub.experts[index], hub.model
    with hub.naming():
        if index not in given:
            return rebuild_expert(origin, task_of(hub), described["input_size"])
        images = [hub.saved.tensors(name).get(name) for name in ("input_mean", "input_std")]
        mean, std = ((), ()) if images[0] is None else (t[index].tolist() for t in images)
        size = described["input_size"] or 0
        return Expert(origin.label, given[index], mean, std, size, label=origin.label)


def task_of(hub: SavedHub) -> HeadTask:
    """What attaches the experts' heads."""
    from ..runs.saved import head_task  # imports what reads images, which others need not

    with hub.naming():
        return head_task(hub.model)


def _tensors(hub: SavedHub, experts: Iterable[int]) -> SavedModel | Completed:
    return complete(hub, experts, task_of(hub)) if hub.references else hub.saved


def _cast(part: nn.Module, saved: SavedModel, prefix: str) -> None:
    """To the precision that the part had, tensor by tensor; buffers that no file keeps, to that of
    its first parameter."""
    there = saved.tensors(prefix)
    first = next((there.get(prefix + name) for name, _ in part.named_parameters()), None)
    if first is not None and first.is_floating_point():
        part.to(first.dtype)
    for name, tensor in part.state_dict(keep_vars=True).items():
        saved_as = there.get(prefix + name)
        if saved_as is not None and tensor.is_floating_point() and saved_as.is_floating_point():
            tensor.data = tensor.data.to(saved_as.dtype)


def _freeze(model: nn.Module, frozen: Sequence[str] | None, given: Sequence[str]) -> None:
    """Gradients where there were some; what was given keeps its own. None: as names have it."""
    if frozen is None:
        return
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(given)):
            parameter.requires_grad_(name not in frozen)


def _normalization(hub: SavedHub, normalized: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As long and as wide as the file's, which takes its place."""
    if not normalized:
        return None
    mean = hub.saved.tensors("input_mean").get("input_mean")
    if mean is None:
        raise CheckpointError(f"{hub.folder} lacks the normalisation of its images, input_mean")
    return torch.zeros_like(mean), torch.ones_like(mean)


def _needed(hub: SavedHub, experts: tuple[int, ...] | None = None) -> dict[int | str, str]:
    """What no name builds, with its class. experts: of these alone, and of nothing else."""
    with hub.naming():
        numbers = range(len(hub.experts)) if experts is None else experts
        needed: dict[int | str, str] = {
            i: hub.experts[i].module for i in numbers if hub.experts[i].spec is None
        }
        if experts is None:
            generator, aggregator = (
                _innermost(hub.model, part) for part in (GENERATOR, AGGREGATOR)
            )
            own = generator["kind"] == "features" and hub.origin.router is None
            if own or generator["kind"] == "module":
                needed[GENERATOR] = generator.get("module", "FeatureGenerator")
            if aggregator["kind"] == "module":
                needed[AGGREGATOR] = aggregator["module"]
        return needed


def _innermost(described: Mapping, part: str) -> Mapping:
    """What is described of a part, or of the one that newcomers were put around."""
    while part in described:
        described = described[part]
    return described


def _check_modules(given: Modules, needed: Mapping, argument: str, hub: SavedHub) -> None:
    """Raises ValueError for modules that are missing, are none, or stand for nothing."""
    parts = [*range(len(hub.experts)), GENERATOR, AGGREGATOR]
    unknown = [key for key in given if key not in parts]
    if unknown:
        raise ValueError(
            f"{argument}: expected numbers of experts, 0..{len(hub.experts) - 1}, "
            f"{GENERATOR!r} or {AGGREGATOR!r}, got {unknown[0]!r}"
        )
    wrong = [key for key, module in given.items() if not isinstance(module, nn.Module)]
    if wrong:
        raise ValueError(
            f"{argument}: expected an nn.Module for {wrong[0]!r}, got "
            f"{type(given[wrong[0]]).__name__}; make it first, as for training"
        )
    missing = {key: name for key, name in needed.items() if key not in given}
    if missing:
        listed = ", ".join(f"{key!r}: {name}" for key, name in needed.items())
        way = "module=" if argument == "module" else "modules={" + listed + "}, each made already"
        raise ValueError(
            f"{argument}: {hub.folder} holds modules of its maker's own, which no name builds "
            f"({listed}); give {way}"
        )
