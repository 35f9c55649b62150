"""A run's model and its batches, from its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EvalBatches, ImageDataset, Mixing, RandomCrops, SummedCrops, TrainStream
from ..data.splits import Split
from ..data.transforms import eval_transform, square_transform, train_transform
from ..hub import Expert, build_experts, create_model, head_parameters
from ..model import HubPathway, PathwayGenerator, always_on, make_aggregator
from ..tasks import Classification
from ..training import Task, evaluate
from ..training.random_state import seed_all
from .config import FitConfig


def build_model(config: FitConfig, num_outputs: int, image_size: int, pretrained: bool):
    """The Hub-Pathway that ``config`` describes, for images of ``image_size`` pixels a side."""
    experts = make_experts(config, num_outputs, image_size, pretrained)
    return make_pathway(config, experts, num_outputs, image_size, pretrained=pretrained)


def build_seeded(config: FitConfig, num_outputs: int, image_size: int) -> HubPathway:
    """The model with its new parts drawn by the run's seed, whatever was drawn before."""
    seed_all(config.trainer.seed)
    return build_model(config, num_outputs, image_size, config.pretrained)


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


def train_stream(split: Split, config: FitConfig, image_size: int, num_outputs: int) -> TrainStream:
    """The training batches, cropped and flipped where ``config.augment`` says, and then mixed."""
    settings, crops, mixed = config.trainer, None, mixing(config, num_outputs)
    if config.augment == "device":
        transform = square_transform(image_size)
        crops = RandomCrops(image_size, config.flip, config.min_area, settings.seed)
    else:
        transform = train_transform(image_size, config.flip, config.min_area)
    return TrainStream(
        ImageDataset(split, transform),
        settings.batch_size,
        settings.seed,
        config.workers,
        settings.device,
        config.prefetch,
        _in_turn([step for step in (crops, mixed) if step is not None]),
    )


def mixing(config: FitConfig, num_outputs: int) -> Mixing | None:
    """What mixes the training images; None where the settings say nothing of it."""
    if not config.mixes:
        return None
    return Mixing(
        num_outputs,
        config.mixup,
        config.cutmix,
        config.mixup_prob,
        config.mixup_switch_prob,
        config.mixup_mode,
        config.trainer.seed,
    )


def _in_turn(changes: Sequence[Callable]) -> Callable | None:
    """Changes (images, targets, step) -> (images, targets) as one; None of none."""

    def change(images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        for each in changes:
            images, targets = each(images, targets, step)
        return images, targets

    return change if changes else None


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
        config.prefetch,
    )


def kind_of_task(config: FitConfig) -> type[Classification]:
    """What a run learns, before its data is known."""
    return Classification


def make_task(config: FitConfig, data: Any) -> Classification:
    """What a run learns of its data: anything that has ``classes``."""
    return Classification(tuple(data.classes), config.label_smoothing)


def saved_task(config: FitConfig, record: Mapping[str, Any]) -> Classification:
    """The task again, from what its ``record`` was when it was written down."""
    return Classification(tuple(record["classes"]), config.label_smoothing)


def score(
    model: HubPathway,
    task: Task,
    split: Split,
    config: FitConfig,
    image_size: int,
    crops: int = 1,
    device: str | None = None,
) -> dict[str, float]:
    """What ``evaluate`` says of a split, over ``crops`` crops of each image."""
    batches = eval_batches(split, config, image_size, crops, device)
    scored = model if crops == 1 else SummedCrops(model)
    return evaluate(scored, batches, task, device, config.trainer.amp)
