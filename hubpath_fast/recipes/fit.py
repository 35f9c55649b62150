"""``hubpath fit``: a hub of named models and a set of images in, a trained Hub-Pathway out.

A run's folder holds ``fit.json`` (the settings and what the data turned out to be), ``last/`` and
``best/`` (checkpoints), ``log.jsonl``, ``tensorboard/`` and, at the end, ``result.json``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from ..data import (
    EvalBatches,
    ImageDataset,
    ImageSplits,
    RandomCrops,
    SummedCrops,
    TrainStream,
    cache_splits,
    open_dataset,
)
from ..data.images import default_workers
from ..data.named import FOLDER
from ..data.splits import Split
from ..data.transforms import eval_transform, resized_side, square_transform, train_transform
from ..executors import choose
from ..files import write_json
from ..hub import Expert, build_experts, create_model, default_input_size, head_parameters
from ..model import HubPathway, HubPathwayLoss, MLPAggregator
from ..runs.config import FREE, FitConfig
from ..runs.resolve import FIT_FILE, read_record
from ..training import (
    PathwayObjective,
    Trainer,
    TrainResult,
    evaluate,
    find_checkpoint,
    load_weights,
)
from ..training.random_state import seed_all

RESULT_FILE = "result.json"


@dataclass
class Run:
    """A trained run, opened again: its settings, its classes and its model in evaluation mode."""

    config: FitConfig
    classes: tuple[str, ...]
    image_size: int
    model: HubPathway


def build_model(config: FitConfig, num_outputs: int, image_size: int, pretrained: bool):
    """The Hub-Pathway that ``config`` describes, for images of ``image_size`` pixels a side."""
    experts = make_experts(config, num_outputs, image_size, pretrained)
    return make_pathway(config, experts, num_outputs, image_size)


def make_experts(
    config: FitConfig, num_outputs: int, image_size: int, pretrained: bool
) -> list[Expert]:
    """The hub of ``config``, each expert with a new head."""
    experts = build_experts(config.hub, num_outputs, pretrained, image_size)
    for expert in experts:
        if config.head_init is not None:
            draw_head(expert.module, config.head_init)
        if config.channels_last:
            expert.module.to(memory_format=torch.channels_last)
    return experts


def make_pathway(
    config: FitConfig,
    experts: Sequence[Expert],
    num_outputs: int,
    image_size: int,
    k: int | None = None,
) -> HubPathway:
    """A Hub-Pathway of these experts. k: in place of ``config.k``."""
    aggregator = MLPAggregator(len(experts), num_outputs) if config.aggregator == "mlp" else None
    model = create_model(
        experts,
        num_outputs,
        config.k if k is None else k,
        input_size=image_size,
        generator_width=config.generator_width,
        generator_stride=config.generator_stride,
        aggregator=aggregator,
        min_group=config.min_group,
        renormalize=config.renormalize,
        executor=config.executor,
    )
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def draw_head(expert: nn.Module, std: float) -> None:
    """Draws the weights of an expert's new head from N(0, std), and sets its biases to 0."""
    head = {id(p) for p in head_parameters(expert)}
    for layer in expert.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and id(layer.weight) in head:
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def train_stream(split: Split, config: FitConfig, image_size: int) -> TrainStream:
    """The training batches, cropped and flipped where ``config.augment`` says."""
    settings, augment = config.trainer, None
    if config.augment == "device":
        transform = square_transform(image_size)
        augment = RandomCrops(image_size, config.flip, config.min_area, settings.seed)
    else:
        transform = train_transform(image_size, config.flip, config.min_area)
    return TrainStream(
        ImageDataset(split, transform),
        settings.batch_size,
        settings.seed,
        config.workers,
        settings.device,
        config.ahead,
        augment,
    )


def eval_batches(
    split: Split, config: FitConfig, image_size: int, crops: int = 1, device: str | None = None
) -> EvalBatches:
    """A split in its own order, centre crops or several an image, ready for ``evaluate``."""
    dataset = ImageDataset(split, eval_transform(image_size, crops))
    return EvalBatches(
        dataset,
        config.trainer.batch_size,
        config.workers,
        device or config.trainer.device,
        config.ahead,
    )


def score(
    model: HubPathway,
    split: Split,
    config: FitConfig,
    image_size: int,
    crops: int = 1,
    device: str | None = None,
) -> dict[str, float]:
    """What ``evaluate`` says of a split, over ``crops`` crops of each image."""
    batches = eval_batches(split, config, image_size, crops, device)
    scored = model if crops == 1 else SummedCrops(model)
    return evaluate(scored, batches, device, config.trainer.amp)


def fit(
    config: FitConfig, out_dir: str | Path, resume: bool = False, console: Console | None = None
) -> tuple[TrainResult, dict[str, Any]]:
    """Trains, evaluates the best checkpoint on the test split, and writes ``result.json``.

    Returns:
        (the training's result, the contents of ``result.json``; empty if a signal stopped the run).

    Raises:
        ValueError: anything wrong with the data, the hub or the output folder, before training.
        NonFiniteLoss: the loss became NaN or infinite; the last good checkpoint is kept.
    """
    console = console or Console()
    out_dir = Path(out_dir)
    image_size = config.image_size or default_input_size(config.hub)
    splits = open_dataset(config.dataset, config.data, config.validation, config.trainer.seed)
    model = build_seeded(config, splits.num_classes, image_size)
    _banner(console, config, splits, image_size, model)
    splits = _cached(splits, config, image_size, console)

    settings = config.trainer
    trainer = Trainer(
        model,
        PathwayObjective(
            HubPathwayLoss(explore=config.explore, label_smoothing=config.label_smoothing)
        ),
        train_stream(splits.train, config, image_size),
        settings,
        out_dir,
        validation=eval_batches(splits.validation, config, image_size)
        if len(splits.validation)
        else None,
        run={"fit": _identity(config), "classes": list(splits.classes)},
        resume=resume,
        expert_names=expert_names(config.hub),
        console=console,
        resume_hint=f"the same command and --resume (--out {out_dir})",
    )
    write_json(
        out_dir / FIT_FILE,
        {"config": config.to_dict(), "classes": list(splits.classes), "image_size": image_size},
    )
    result = trainer.fit()
    if result.interrupted:
        return result, {}
    trainer.load_best()
    test = score(model, splits.test, config, image_size)
    summary = {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "test_images": test["n"],
        "test_is_validation": splits.test_is_validation,
        "best_validation": result.best_metric,
        "best_step": result.steps if result.best_metric is None else result.best_step,
        "steps": result.steps,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "seed": settings.seed,
    }
    if config.crops > 1:
        scores = score(model, splits.test, config, image_size, config.crops)
        summary[f"test_accuracy_{config.crops}_crops"] = scores["accuracy"]
    write_json(out_dir / RESULT_FILE, summary)
    name = "validation (there is no test split)" if splits.test_is_validation else "test"
    console.print(
        f"[bold]{name}: {100 * test['accuracy']:.2f} % of {test['n']} images[/] with the weights "
        f"of step {summary['best_step']}; kept in "
        f"{out_dir / ('best' if len(splits.validation) else 'last')}"
    )
    if config.crops > 1:
        accuracy = summary[f"test_accuracy_{config.crops}_crops"]
        console.print(f"[bold]{name}: {100 * accuracy:.2f} %[/] over {config.crops} crops an image")
    return result, summary


def build_seeded(config: FitConfig, num_outputs: int, image_size: int) -> HubPathway:
    """The model with its new parts drawn by the run's seed, whatever was drawn before."""
    seed_all(config.trainer.seed)
    return build_model(config, num_outputs, image_size, config.pretrained)


def open_run(run: str | Path, device: str = "cpu") -> Run:
    """Opens a run's best checkpoint (the last one, where none was evaluated yet).

    Raises:
        ValueError: the folder holds no run, or its checkpoint is damaged or of another model.
    """
    run = Path(run)
    record = read_record(run)
    config = FitConfig.from_dict(record["config"])
    folder = next((run / n for n in ("best", "last") if find_checkpoint(run / n)), None)
    if folder is None:
        raise ValueError(f"{run} has no checkpoint yet; finish the run with --resume first")
    there = torch.device(config.trainer.device).type
    executor = config.executor if torch.device(device).type == there else "auto"
    here = dataclasses.replace(config, executor=executor)
    model = build_model(here, len(record["classes"]), record["image_size"], pretrained=False)
    load_weights(model, folder)
    model.to(device).eval()
    return Run(config, tuple(record["classes"]), record["image_size"], model)


def expert_names(hub: tuple[str, ...]) -> list[str]:
    """The names of a hub's experts, told apart by a number where one occurs again."""
    names = []
    for i, name in enumerate(hub):
        again = hub[:i].count(name) + 1
        names.append(name if hub.count(name) == 1 else f"{name} #{again}")
    return names


def _identity(config: FitConfig) -> dict[str, Any]:
    """What makes two runs the same: all settings but the trainer's, which it compares itself, and
    those that change no result."""
    return {k: v for k, v in config.to_dict().items() if k not in (*FREE, "trainer", "crops")}


def _cached(
    splits: ImageSplits, config: FitConfig, image_size: int, console: Console
) -> ImageSplits:
    def tell(text: str) -> None:
        console.print(f"[bold]cache[/] {escape(text)}", soft_wrap=True, highlight=False)

    workers = default_workers() if config.workers is None else config.workers
    side = resized_side(image_size)
    return cache_splits(splits, side, config.cache, config.cache_dir, tell, workers)


def _speed(config: FitConfig) -> str:
    """What decides how fast a step is: the executor and why it is that one, and the rest."""
    device = torch.device(config.trainer.device)
    executor, reasons = choose(config.executor, device, len(config.hub))
    workers = default_workers() if config.workers is None else config.workers
    settings = [
        f"executor {executor} ({'; '.join(reasons)})",
        f"amp {config.trainer.amp}",
        f"channels_last {'on' if config.channels_last else 'off'}",
        f"augment {config.augment}",
        f"{workers} workers" + (", batches copied one ahead" if device.type == "cuda" else ""),
    ]
    return ", ".join(settings)


def _banner(
    console: Console, config: FitConfig, splits: ImageSplits, image_size: int, model: HubPathway
) -> None:
    trainer, weights = config.trainer, "pre-trained" if config.pretrained else "random"
    place = config.data if config.dataset == FOLDER else config.dataset
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    lines = {
        "hub": f"{', '.join(config.hub)} ({weights} weights), K = {config.k} of "
        f"{len(config.hub)}, {millions:.1f} M parameters",
        "data": f"{place}: {splits.num_classes} classes, {len(splits.train)} train, "
        f"{len(splits.validation)} validation, {len(splits.test)} test images at {image_size} px",
        "run": f"{trainer.steps} steps of {trainer.batch_size} on {trainer.device}, "
        f"{trainer.optimizer} {trainer.schedule}, rate {trainer.lr_expert:g}, seed {trainer.seed}",
        "speed": _speed(config),
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:<6}[/]{escape(text)}", soft_wrap=True, highlight=False)
    for note in splits.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True, highlight=False)
