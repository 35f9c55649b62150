"""``hubpath fit``: a hub of named models and a set of images in, a trained Hub-Pathway out."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..data.images import default_workers, usable_cores
from ..data.named import FOLDER
from ..devices import check_device
from ..executors import choose
from ..hub import default_input_size, expert_names, expert_sources
from ..hub.costs import router_text
from ..hub.labels import legend
from ..locks import locked
from ..model import LARGEST_DEFAULT, HubPathway
from ..notes import show_notes
from ..parallel import Ranks
from ..runs.build import (
    as_built,
    build_seeded,
    eval_batches,
    make_task,
    train_stream,
    training_work,
)
from ..runs.config import FitConfig
from ..runs.data import RunData, open_to_train
from ..runs.folder import Record, RunFolder
from ..runs.kinds import kind_of
from ..runs.on_ranks import (
    check_alike,
    check_folder,
    check_same_data,
    on_rank,
    owners_of,
    placement_text,
    start_ranks,
)
from ..runs.places import check_apart, check_not_taken
from ..runs.start import Start
from ..runs.warm_up import WarmUp, warm_up_heads, warm_up_steps
from ..training import (
    PathwayObjective,
    Reporting,
    Task,
    Trainer,
    TrainResult,
    find_checkpoint,
)
from ..written import LANDMARKS, RUN, SEEDS
from .finish import check_fallback, finish


def fit(
    config: FitConfig,
    out_dir: str | Path,
    resume: bool = False,
    console: Console | None = None,
    asked_out: str | Path | None = None,
    shared: Path | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """Trains, evaluates the best checkpoint on the test split, and writes ``result.json``.

    asked_out: what the command that goes on with it names; None: ``out_dir``. shared: the list of
    the images that several runs draw from; the first one writes it.

    Returns:
        (the training's result, the contents of ``result.json``; empty if a signal stopped the run).

    Raises:
        ValueError: anything wrong with the data, the hub or the output folder, before training.
        NonFiniteLoss: the loss became NaN or infinite; the last good checkpoint is kept.
        WorkerFailure: a process that decodes images was killed; the last checkpoint is kept.
    """
    console, out_dir = console or Console(), Path(out_dir)
    ranks = start_ranks(config)
    with ranks.last_words(), ExitStack() as held:
        with ranks.agreed("opening the folder of the run"):
            config = on_rank(config, ranks)
            check_device(config.trainer.device)
            check_apart(out_dir, config.dataset, config.data)  # before there is a lock in it
            check_not_taken(out_dir, RUN, LANDMARKS, SEEDS)
            if ranks.is_first:
                held.enter_context(locked(out_dir, console=console))
        check_folder(ranks, out_dir)
        if not ranks.is_first:
            console = Console(quiet=True)
        check_alike(ranks, config, resume)
        return _fit(config, out_dir, resume, console, asked_out or out_dir, shared, ranks)


def _fit(
    config: FitConfig,
    out_dir: Path,
    resume: bool,
    console: Console,
    asked_out: str | Path,
    shared: Path | None,
    ranks: Ranks,
) -> tuple[TrainResult, dict[str, Any]]:
    folder = RunFolder(out_dir)
    with ranks.agreed("opening the data"):
        image_size = config.image_size or default_input_size(config.hub)
        start = _start(config, out_dir, resume)
        data = open_to_train(config, folder, resume, shared, start and start.images)
        splits = data.splits
        if resume and folder.has_run:
            config = config.settled(folder.record().config)
        check_fallback(config, splits)
        if config.warm_up:
            warm_up_steps(config.warm_up, len(splits.train), config.trainer)
        settings, task = config.trainer, make_task(config, splits)
        if start is not None:
            start.check(task.classes, len(config.hub))
    check_same_data(ranks, data, config)
    with ranks.agreed("building the hub"):
        owners = owners_of(config, image_size, ranks)
        own = None if owners is None else ranks.own(owners)
        model = build_seeded(config, task, image_size, own)
        if start is not None:
            start.load_into(model)
        model.distribute(ranks, owners)
        config = as_built(config, model)
    if ranks.is_first:
        _banner(console, config, task, splits, image_size, model)
        if start is not None:
            _line(console, "start", start.describe())
    for first in (True, False):  # one rank writes the cache, the others find it
        with ranks.agreed("reading the images"):
            if ranks.is_first == first:
                splits = _cached(splits, config, image_size, console)

    objective = PathwayObjective(task.criterion(config.explore, **config.supervision))
    run = {"fit": _identity(config), **task.record()}
    trainer = Trainer(
        model,
        objective,
        train_stream(splits.train, config, image_size, task.num_outputs, ranks),
        settings,
        out_dir,
        task=task,
        validation=eval_batches(splits.validation, config, image_size, ranks=ranks)
        if len(splits.validation)
        else None,
        run=run,
        resume=resume,
        reporting=Reporting(
            console,
            expert_names=expert_names(config.hub),
            resume_hint=f"the same command and --resume (--out {asked_out})",
        ),
        ranks=ranks,
    )
    with ranks.agreed("writing what the run is"):
        if ranks.is_first:
            _write_beginning(folder, config, task, data, image_size, shared)
    warmed = WarmUp()
    if config.warm_up:
        images, names = eval_batches(splits.train, config, image_size), expert_names(config.hub)
        warmed = warm_up_heads(
            trainer, objective, images, config.warm_up, resume, run, names,
            lambda text: _line(console, "heads", text),
        )  # fmt: skip
        if warmed.interrupted:
            return trainer.state.result(True, []), {}
    result = trainer.fit()
    if result.interrupted:
        return result, {}
    trainer.load_best()
    with trainer.reading():
        return result, finish(
            model, task, result, splits, config, image_size, folder, console, warmed.costs(), ranks
        )


def _start(config: FitConfig, out_dir: Path, resume: bool) -> Start | None:
    """What the hub starts with; None: new parts, or a checkpoint, which has everything."""
    if config.start is None or (resume and find_checkpoint(out_dir / "last") is not None):
        return None
    return Start.read(config.start)


def _write_beginning(
    folder: RunFolder,
    config: FitConfig,
    task: Task,
    data: RunData,
    image_size: int,
    shared: Path | None,
) -> None:
    """What the folder holds before the first step."""
    # The list first: a record without one is a run of an earlier version, which draws again.
    if shared is not None and not shared.is_file() and (files := data.files(config, shared=True)):
        files.write(shared)
    if not data.kept:
        folder.write_files(data.files(config))
    if not folder.has_result:
        folder.write_routes(None)  # of a run that was deleted
    folder.write_record(Record(config, task.record(), image_size))


def _identity(config: FitConfig) -> dict[str, Any]:
    """What makes two runs the same, but for the trainer's settings, which it compares itself."""
    identity = config.identity()
    return {name: identity[name] for name in identity if not name.startswith("trainer.")}


def _cached(splits: Any, config: FitConfig, image_size: int, console: Console) -> Any:
    def tell(text: str) -> None:
        console.print(f"[bold]cache[/] {escape(text)}", soft_wrap=True, highlight=False)

    return kind_of(config).cached(splits, config, image_size, tell)


def _aggregator(config: FitConfig, model: HubPathway) -> str:
    """What the aggregator is, where it is not a linear map of a usual size."""
    kind, experts, outputs = config.aggregator, len(model.experts), model.num_outputs
    weights = sum(p.numel() for p in model.aggregator.parameters())
    linear = experts * outputs**2
    if kind == "auto" and linear > LARGEST_DEFAULT:
        return (
            f"; the aggregator is the weighted sum, since a linear one would have "
            f"{linear / 1e6:,.0f} M weights (--set aggregator=linear takes it)"
        )
    if kind in ("auto", "linear") and linear <= LARGEST_DEFAULT:
        return ""
    size = f", {weights / 1e6:,.1f} M of them" if weights else ""
    return f"; the aggregator is {kind}{size}"


def _mixed(config: FitConfig) -> list[str]:
    """How training images are mixed."""
    if not config.mixes:
        return []
    alphas = {"mixup": config.mixup, "cutmix": config.cutmix}
    words = [f"{name} {alpha}" for name, alpha in alphas.items() if alpha]
    if config.mixup_prob < 1 or config.mixup_mode != "batch":
        words[-1] += f" (probability {config.mixup_prob}, drawn by {config.mixup_mode})"
    return words


def _speed(config: FitConfig, model: HubPathway, image_size: int) -> str:
    """What decides how fast a step is: the executor and why it is that one, and the rest."""
    work = training_work(config, image_size)
    device, choice = work.device, choose(config.executor, work, model.experts, config.k)
    workers = default_workers() if config.workers is None else config.workers
    settings = [
        f"executor {choice.executor} ({'; '.join([*choice.reasons, *choice.notes])})",
        *([] if config.room is None else [f"experts in a room of {config.room}"]),
        f"amp {config.trainer.amp}",
        f"channels_last {'on' if config.channels_last else 'off'}",
        f"augment {config.augment}",
        *_mixed(config),
        f"{workers} workers" + (", batches copied one ahead" if device.type == "cuda" else ""),
    ]
    return ", ".join(settings)


def busy_note(load: float, cores: int, threads: int) -> str | None:
    """What to do where more is running than there are cores. load: as ``os.getloadavg`` has it.
    threads: of torch; one waits for nobody."""
    if load <= cores or threads == 1:
        return None
    return (
        f"the load of this machine is {load:.1f} on {cores} cores: other processes take cores from "
        "this run, and with several threads every layer waits for the one that lost its core. "
        "OMP_NUM_THREADS=1 before the command avoids the waiting; or wait until they are done"
    )


def _line(console: Console, name: str, text: str) -> None:
    console.print(f"[bold]{name:<6}[/]{escape(text)}", soft_wrap=True, highlight=False)


def _banner(
    console: Console,
    config: FitConfig,
    task: Task,
    splits: Any,
    image_size: int,
    model: HubPathway,
) -> None:
    trainer, weights = config.trainer, "pre-trained" if config.pretrained else "random"
    place = config.data if config.dataset == FOLDER else config.dataset
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    names = expert_names(config.hub)
    told = [line for line in legend(expert_sources(config.hub), names) if line not in names]
    lines = {
        "hub": f"{', '.join(names)} ({weights} weights), K = {config.k} of "
        f"{len(names)}, {millions:.1f} M parameters{_aggregator(config, model)}\n"
        f"      router: {router_text(model, image_size)}"
        + "".join(f"\n      {line}" for line in told),
        "data": f"{place}: {kind_of(config).describe(task)}, {len(splits.train)} train, "
        f"{len(splits.validation)} validation, {len(splits.test)} test images at {image_size} px",
        "run": f"{trainer.steps} steps of {trainer.batch_size} on {trainer.device}, "
        f"{trainer.optimizer} {trainer.schedule}, rate {trainer.lr_expert:g}, seed {trainer.seed}",
        "speed": _speed(config, model, image_size),
    }
    if model.placement is not None:
        lines["ranks"] = placement_text(model.placement, names)
    for name, text in lines.items():
        _line(console, name, text)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    busy = busy_note(load, usable_cores(), torch.get_num_threads())
    show_notes([*splits.notes, *splits.changes, *([busy] if busy else [])], console)
