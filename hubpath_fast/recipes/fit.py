"""``hubpath fit``: a hub of named models and a folder of images in, a trained Hub-Pathway out.

A run's folder holds ``fit.json`` (the settings and what the data turned out to be), ``last/`` and
``best/`` (checkpoints), ``log.jsonl``, ``tensorboard/`` and, at the end, ``result.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..data import EvalBatches, ImageDataset, ImageSplit, ImageSplits, TrainStream, open_images
from ..data.transforms import eval_transform, train_transform
from ..files import write_json
from ..hub import build_experts, create_model, default_input_size
from ..model import HubPathway, HubPathwayLoss, MLPAggregator
from ..training import (
    PathwayObjective,
    Trainer,
    TrainerConfig,
    TrainResult,
    evaluate,
    find_checkpoint,
    load_weights,
)
from ..training.random_state import seed_all
from .config import FitConfig

FIT_FILE, RESULT_FILE = "fit.json", "result.json"

# Our choice for fine-tuning a few pre-trained networks: AdamW, one cycle, new parts faster.
DEFAULT_TRAINER = TrainerConfig(
    steps=2000,
    batch_size=48,
    lr_expert=3e-4,
    lr_head=1e-3,
    lr_router=3e-3,
    eval_every=200,
    save_every=200,
)


@dataclass
class Run:
    """A trained run, opened again: its settings, its classes and its model in evaluation mode."""

    config: FitConfig
    classes: tuple[str, ...]
    image_size: int
    model: HubPathway


def build_model(config: FitConfig, num_outputs: int, image_size: int, pretrained: bool):
    """The Hub-Pathway that ``config`` describes, for images of ``image_size`` pixels a side."""
    experts = build_experts(config.hub, num_outputs, pretrained, image_size)
    aggregator = MLPAggregator(len(experts), num_outputs) if config.aggregator == "mlp" else None
    return create_model(
        experts,
        num_outputs,
        config.k,
        input_size=image_size,
        generator_width=config.generator_width,
        generator_stride=config.generator_stride,
        aggregator=aggregator,
        min_group=config.min_group,
        renormalize=config.renormalize,
    )


def eval_batches(split: ImageSplit, config: FitConfig, image_size: int) -> EvalBatches:
    """A split in its own order, centre crops, ready for ``evaluate``."""
    dataset = ImageDataset(split, eval_transform(image_size))
    return EvalBatches(dataset, config.trainer.batch_size, config.workers, config.trainer.device)


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
    splits = open_images(config.data, config.validation, config.trainer.seed)
    model = build_seeded(config, splits.num_classes, image_size)
    _banner(console, config, splits, image_size, model)

    dataset = ImageDataset(splits.train, train_transform(image_size, config.flip, config.min_area))
    settings = config.trainer
    trainer = Trainer(
        model,
        PathwayObjective(
            HubPathwayLoss(explore=config.explore, label_smoothing=config.label_smoothing)
        ),
        TrainStream(dataset, settings.batch_size, settings.seed, config.workers, settings.device),
        settings,
        out_dir,
        validation=eval_batches(splits.validation, config, image_size),
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
    test = evaluate(model, eval_batches(splits.test, config, image_size), amp=settings.amp)
    summary = {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "test_images": test["n"],
        "test_is_validation": splits.test_is_validation,
        "best_validation": result.best_metric,
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "seed": settings.seed,
    }
    write_json(out_dir / RESULT_FILE, summary)
    name = "validation (there is no test split)" if splits.test_is_validation else "test"
    console.print(
        f"[bold]{name}: {100 * test['accuracy']:.2f} % of {test['n']} images[/] with the weights "
        f"of step {result.best_step}; kept in {out_dir / 'best'}"
    )
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
    record = _read_record(run)
    config = FitConfig.from_dict(record["config"])
    folder = next((run / n for n in ("best", "last") if find_checkpoint(run / n)), None)
    if folder is None:
        raise ValueError(f"{run} has no checkpoint yet; finish the run with --resume first")
    model = build_model(config, len(record["classes"]), record["image_size"], pretrained=False)
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


def _read_record(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / FIT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{run} holds no run of `hubpath fit` (no {FIT_FILE}); give the folder named by --out"
        ) from None
    except ValueError as error:
        raise ValueError(f"{run / FIT_FILE} is damaged ({error})") from error


def _identity(config: FitConfig) -> dict[str, Any]:
    """What makes two runs the same: all settings but the trainer's, which it compares itself, and
    those that change no result."""
    values = config.to_dict()
    return {k: v for k, v in values.items() if k not in ("trainer", "workers", "data")}


def _banner(
    console: Console, config: FitConfig, splits: ImageSplits, image_size: int, model: HubPathway
) -> None:
    trainer, weights = config.trainer, "pre-trained" if config.pretrained else "random"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    lines = {
        "hub": f"{', '.join(config.hub)} ({weights} weights), K = {config.k} of "
        f"{len(config.hub)}, {millions:.1f} M parameters",
        "data": f"{config.data}: {splits.num_classes} classes, {len(splits.train)} train, "
        f"{len(splits.validation)} validation, {len(splits.test)} test images at {image_size} px",
        "run": f"{trainer.steps} steps of {trainer.batch_size} on {trainer.device}, "
        f"{trainer.optimizer} {trainer.schedule}, rate {trainer.lr_expert:g}, amp {trainer.amp}, "
        f"executor {model.executor}, seed {trainer.seed}",
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:<5}[/]{escape(text)}", soft_wrap=True, highlight=False)
    for note in splits.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True, highlight=False)


def settings(
    out_dir: str | Path,
    resume: bool,
    file: str | Path | None,
    top: Mapping[str, Any],
    trainer: Mapping[str, Any],
) -> FitConfig:
    """A run's settings: the defaults; over them ``file``, or those of the run that is resumed; over
    them what was asked for (``top`` for the run, ``trainer`` for its trainer; None: not asked).

    Raises:
        ValueError: no data or no hub, an unknown or impossible setting.
    """
    base: dict[str, Any] = {"trainer": DEFAULT_TRAINER.to_dict()}
    if file is not None:
        base = FitConfig.load(file).to_dict()
    elif resume and (Path(out_dir) / FIT_FILE).is_file():
        base = _read_record(Path(out_dir))["config"]
    base |= {name: value for name, value in top.items() if value is not None}
    asked = {name: value for name, value in trainer.items() if value is not None}
    for name, example in (("data", "--data FOLDER"), ("hub", "--hub resnet50.a1_in1k,...")):
        if name not in base:
            raise ValueError(f"{name}: nothing given; use {example}")
    settings = dict(base["trainer"]) | asked
    if "eval_every" not in asked and "steps" in asked:
        settings["eval_every"] = max(1, settings["steps"] // 10)
    return FitConfig.from_dict({**base, "trainer": settings})
