"""A run's model and its batches, from its settings."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EvalBatches, SummedCrops, TrainStream
from ..data.order import Places
from ..executors import ResidentExecutor, Workload
from ..hub import Expert, build_experts, create_model, head_parameters
from ..hub.source import HeadTask, PlainTask
from ..model import HubPathway, PathwayGenerator, always_on, make_aggregator
from ..parallel.ranks import Ranks
from ..training import Task, evaluate
from ..training.random_state import seed_all
from .config import LANDMARKS, FitConfig
from .kinds import kind_of


def build_model(
    config: FitConfig,
    task: HeadTask,
    image_size: int,
    pretrained: bool,
    own: Container[int] | None = None,
) -> HubPathway:
    """The Hub-Pathway that ``config`` describes, for images of ``image_size`` pixels a side. own:
    numbers of the experts that this process has, see ``build_experts``."""
    experts = make_experts(config, task, image_size, pretrained, own)
    model = make_pathway(config, experts, task.num_outputs, image_size, pretrained=pretrained)
    if not isinstance(task, PlainTask):
        model.origin = model.origin.with_task(describe_task(config, task))
    return model


def describe_task(config: FitConfig, task: Task) -> dict[str, Any]:
    """What is learned, as a saved model says it: what ``saved_task`` needs beside the record of
    the task itself, and that."""
    described = {"name": config.task, "dataset": config.dataset, **task.record()}
    if config.task == LANDMARKS:
        described["settings"] = config.landmarks.to_dict()
    return described


def build_seeded(
    config: FitConfig, task: HeadTask, image_size: int, own: Container[int] | None = None
) -> HubPathway:
    """The model with its new parts drawn by the run's seed, whatever was drawn before, and whatever
    experts are this process's own."""
    seed_all(config.trainer.seed)
    return build_model(config, task, image_size, config.pretrained, own)


def as_built(config: FitConfig, model: HubPathway) -> FitConfig:
    """The settings with what was chosen by costs for ``model``, the generator's size or an expert's
    number: what a run's folder keeps, so that a version or a library that counts FLOPs otherwise
    builds the same model."""
    generator, watched = model.generator, always_on(model.generator)
    if config.router == "expert" and watched is not None:
        return config.replace(router=f"expert:{list(model.experts).index(watched.source.module)}")
    if config.generator_width is not None or not isinstance(generator, PathwayGenerator):
        return config
    return config.replace(generator_width=generator.width, generator_stride=generator.stride)


def make_experts(
    config: FitConfig,
    task: HeadTask,
    image_size: int,
    pretrained: bool,
    own: Container[int] | None = None,
) -> list[Expert]:
    """The hub of ``config``, each expert with a new head for the task. own: see
    ``build_experts``."""
    experts = build_experts(
        config.hub, task.num_outputs, pretrained, image_size, task=task, own=own
    )
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
    pretrained: bool | None = None,
) -> HubPathway:
    """A Hub-Pathway of these experts. k: in place of ``config.k``. pretrained: whether a router's
    own network gets its weights; None: as ``config.pretrained`` says."""
    aggregator = make_aggregator(config.aggregator, len(experts), num_outputs)
    model = create_model(
        experts,
        num_outputs,
        config.k if k is None else k,
        pretrained=config.pretrained if pretrained is None else pretrained,
        input_size=image_size,
        router=config.router,
        generator_width=config.generator_width,
        generator_stride=config.generator_stride,
        aggregator=aggregator,
        min_group=config.min_group,
        renormalize=config.renormalize,
        executor=(
            config.executor
            if config.room is None
            else ResidentExecutor(config.room, config.executor)
        ),
    )
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def draw_head(expert: nn.Module, std: float) -> None:
    """Draws the weights of an expert's new head from N(0, std), and sets its biases to 0.

    Of one on the meta device they are drawn and dropped: what is drawn next is as it would be."""
    head = {id(p) for p in head_parameters(expert)}
    for layer in expert.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and id(layer.weight) in head:
            weight = layer.weight
            drawn = torch.empty_like(weight, device="cpu") if weight.is_meta else weight
            nn.init.normal_(drawn, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def training_work(config: FitConfig, image_size: int) -> Workload:
    """What the experts are given at once in training: a micro-batch."""
    trainer = config.trainer
    size = -(-trainer.batch_size // trainer.accumulate)
    precision = torch.bfloat16 if trainer.amp == "bf16" else None
    return Workload(
        torch.device(trainer.device), size, True, (3, image_size, image_size), precision
    )


def train_stream(
    split: Any, config: FitConfig, image_size: int, num_outputs: int, ranks: Ranks = Ranks()
) -> TrainStream:
    """The training batches, augmented as the settings say; this rank's part of them."""
    settings, kind = config.trainer, kind_of(config)
    return TrainStream(
        kind.train_dataset(split, config, image_size),
        settings.batch_size,
        settings.seed,
        config.workers,
        settings.device,
        config.prefetch,
        batch_changes(config, image_size, num_outputs),
        ranks.share(settings.accumulate),
        pairs=config.mixes,
    )


def batch_changes(config: FitConfig, image_size: int, num_outputs: int) -> Callable | None:
    """What happens to whole training batches, as one (images, targets, step) -> (images, targets),
    which is also given the ``Places`` of a rank's part; None: nothing."""
    changes = kind_of(config).batch_changes(config, image_size, num_outputs)

    def change(
        images: Tensor, targets: Tensor, step: int, *places: Places
    ) -> tuple[Tensor, Tensor]:
        for each in changes:
            images, targets = each(images, targets, step, *places)
        return images, targets

    return change if changes else None


def eval_batches(
    split: Any,
    config: FitConfig,
    image_size: int,
    crops: int = 1,
    device: str | None = None,
    ranks: Ranks = Ranks(),
) -> EvalBatches:
    """A split in its own order, of images centre crops or several, ready for ``evaluate``; this
    rank's part of each batch."""
    return EvalBatches(
        kind_of(config).eval_dataset(split, config, image_size, crops),
        config.trainer.batch_size,
        config.workers,
        device or config.trainer.device,
        config.prefetch,
        ranks.share(),
    )


def kind_of_task(config: FitConfig) -> type:
    """What a run learns, before its data is known."""
    return kind_of(config).task


def make_task(config: FitConfig, data: Any) -> Task:
    """What a run learns of its data."""
    return kind_of(config).make_task(config, data)


def saved_task(config: FitConfig, record: Mapping[str, Any]) -> Task:
    """The task again, from what its ``record`` was when it was written down."""
    return kind_of(config).saved_task(config, record)


def score(
    model: HubPathway,
    task: Task,
    split: Any,
    config: FitConfig,
    image_size: int,
    crops: int = 1,
    device: str | None = None,
    expert_major: bool = False,
    ranks: Ranks = Ranks(),
) -> dict[str, float]:
    """What ``evaluate`` says of a split, over ``crops`` crops of each image.

    Raises ValueError for several crops expert by expert."""
    if expert_major and crops != 1:
        raise ValueError(
            f"crops: expected 1 where experts are asked one after another, got {crops}; leave out "
            "--expert-major"
        )
    # What is asked expert by expert waits on the host.
    where = "cpu" if expert_major else device
    batches = eval_batches(split, config, image_size, crops, where, ranks)
    scored = model if crops == 1 else SummedCrops(model)
    return evaluate(scored, batches, task, device, config.trainer.amp, ranks, expert_major)
