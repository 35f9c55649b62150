"""A run on several ranks: how they start, what they must have alike, and which has which expert."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..data.kept import FileList
from ..hub import expert_sources
from ..hub.build import working_size
from ..hub.costs import TASK, costs
from ..hub.registry import find
from ..hub.spec import read_specs
from ..locks import LOCK
from ..model.distributing import Placement
from ..parallel import Ranks, start
from ..parallel.placement import plan
from ..parallel.share import check_batch_size
from .config import FitConfig
from .data import RunData

PACKAGES = ("hubpath_fast", "torch", "torchvision", "timm", "triton", "numpy", "safetensors")


def start_ranks(config: FitConfig) -> Ranks:
    """The ranks that torchrun has started for a run; ValueError for settings that they refuse."""
    everyone = start("dp", device=config.trainer.device)  # so that they refuse together
    with everyone.agreed("reading the settings"):
        count = len(read_specs(config.hub))
    ranks = start(config.parallel, count, config.trainer.device)
    if ranks.single:
        return ranks
    with ranks.agreed("reading the settings"):
        check_batch_size(config.trainer.batch_size, ranks.world)
        if config.warm_up is not None:
            raise ValueError(
                f"warm_up: expected None on several ranks, got {config.warm_up}; its heads are "
                "trained on features of all experts in one process: leave it out, or start one"
            )
    return ranks


def on_rank(config: FitConfig, ranks: Ranks) -> FitConfig:
    """The settings with this rank's own device, where they say no number: of several GPUs each
    rank of a machine takes its own."""
    device, local = config.trainer.device, os.environ.get("LOCAL_RANK")
    if ranks.single or device != "cuda" or local is None:
        return config
    torch.cuda.set_device(int(local))
    return config.replace(trainer=config.trainer.replace(device=f"cuda:{local}"))


def check_folder(ranks: Ranks, out_dir: Path) -> None:
    """ValueError, on all ranks, where one does not see the folder that the first one has locked."""
    locked = ranks.gather((out_dir / LOCK).is_file())[0]  # some file systems have no locks
    with ranks.agreed("opening the folder of the run"):
        if not out_dir.is_dir() or (locked and not (out_dir / LOCK).is_file()):
            raise ValueError(
                f"out: {out_dir} is not the folder that rank 0 has opened; give a folder that all "
                "ranks see, by its whole path"
            )


def check_alike(ranks: Ranks, config: FitConfig, resume: bool) -> None:
    """ValueError, on all ranks, where they were started with different settings, hubs or package
    versions."""
    if ranks.single:
        return
    settings = {key: str(value) for key, value in config.identity().items()}
    versions = {f"version of {name}": found for name, found in _versions().items()}
    sources = {"sources of the hub": str(expert_sources(config.hub))}
    ranks.check_same({**settings, **sources, "resume": resume, **versions})


def check_same_data(ranks: Ranks, data: RunData, config: FitConfig) -> None:
    """Likewise where they do not see the same images."""
    if ranks.single:
        return
    values: dict[str, object] = {}
    for split, part in data.splits.parts.items():
        values[f"images for {split}"] = len(part)
    with ranks.agreed("listing the images"):
        files = data.files(config)
    if files is not None:
        values["the list of the images"] = _digest(files)
    ranks.check_same(values)


def owners_of(config: FitConfig, image_size: int, ranks: Ranks) -> tuple[int, ...] | None:
    """For each expert the rank of a replica that has it, by what they cost; None for one rank."""
    if ranks.single:
        return None
    if ranks.ep == 1:
        return (0,) * len(read_specs(config.hub))
    counted = []
    for spec in read_specs(config.hub):
        model = find(spec)
        counted.append(costs(model, working_size(spec, model, TASK, image_size)))
    return plan([c.work for c in counted], [c.state_bytes for c in counted], ranks.ep).owners


def placement_text(placement: Placement, names: Sequence[str]) -> str:
    """Who has what, for people."""
    ranks, owners = placement
    if ranks.ep == 1:
        return f"{ranks.world}, each with all {len(owners)} experts (data parallel)"
    each = [
        f"{rank}: {', '.join(n for n, o in zip(names, owners, strict=True) if o == rank) or '-'}"
        for rank in range(ranks.ep)
    ]
    replicas = f", {ranks.dp} replicas" if ranks.dp > 1 else ""
    return f"{ranks.world}{replicas}; experts by rank: {'; '.join(each)}"


def _digest(files: FileList) -> str:
    rows = {split: [tuple(row) for row in rows] for split, rows in files.rows.items()}
    return hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
