"""A model made ready for predictions alone: fewer operations, fewer bytes, nothing for training.

The router decides on scores that lie close together, so in a smaller precision some samples would
go to other experts. So only the experts take another dtype; generator, softmax and aggregator stay
as they are, and the experts' outputs come to them in float32.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .feature_generator import always_on
from .fixed_routes import FixedRoutes
from .folding import Folded, find_foldable, is_norm

if TYPE_CHECKING:
    from .pathway import HubPathway

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
SAVING = (
    "model: expected one that is not frozen for inference, whose BatchNorm layers have become part "
    "of other weights; save it before freeze_for_inference, or export it"
)
TRAINING = (
    "train: expected False of a model that is frozen for inference, got True; its BatchNorm layers "
    "have become part of other weights, so build or load the model again to train it"
)


@dataclass(frozen=True)
class Frozen:
    """What freezing made of a model; text by ``str``.

    parts: of each part, by its name, what became of its BatchNorm layers. dtype: of the experts;
    None: as they were. compiled: whether ``torch.compile`` runs them. captured: whether one image's
    predictions were captured as CUDA graphs.
    """

    parts: dict[str, Folded]
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    compiled: bool = False
    captured: bool = False

    def __str__(self) -> str:
        lines = []
        for name, part in self.parts.items():
            whys = Counter(part.left.values())
            left = "".join(f"; {count} left: {why}" for why, count in whys.items())
            lines.append(f"{name}: {part.folded} BatchNorm folded{left}")
        if self.dtype is not None:
            lines.append(f"experts in {self.dtype}, router and aggregator as they were")
        lines += ["channels_last"] * (self.memory_format == torch.channels_last)
        lines += ["compiled"] * self.compiled + ["graphs of one image captured"] * self.captured
        return "\n".join(lines)


def freeze(
    model: HubPathway,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    compile: bool,
    example: Tensor | None,
) -> None:
    """What ``HubPathway.freeze_for_inference`` does, in place; ``model.frozen`` says it."""
    _check(model, dtype, memory_format, compile)
    model.eval()
    x = _example(model, example)
    parts = _fold(model, x)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    if dtype is not None:
        model.experts.to(dtype)
    if memory_format is not None:
        model.to(memory_format=memory_format)
    if compile:
        model.compile_experts()
    model.frozen = Frozen(parts, dtype, memory_format, compile)
    if x is not None and _capture(model, x[:1]):
        model.frozen = dataclasses.replace(model.frozen, captured=True)


def _check(
    model: HubPathway,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    compile: bool,
) -> None:
    """Raises ValueError, before anything is changed."""
    if model.frozen is not None:
        raise ValueError("freeze_for_inference: the model is frozen already; build or load another")
    if model._compiled:
        raise ValueError(
            "freeze_for_inference: expected a model that is not compiled yet, since what was "
            "compiled has its BatchNorm in it; leave out compile_experts and give compile=True"
        )
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"dtype: expected {names} or None, got {dtype}")
    if memory_format is not None and memory_format not in FORMATS:
        names = ", ".join(map(str, FORMATS))
        raise ValueError(f"memory_format: expected {names} or None, got {memory_format}")
    if dtype not in (None, torch.float32) and always_on(model.generator) is not None:
        raise ValueError(
            f"dtype: expected None of a hub whose router looks at an expert's features, got {dtype}"
            "; in a smaller precision that expert would send images to others"
        )
    if compile and model.executor == "graphs":
        raise ValueError(
            "compile: expected False with executor='graphs', which captures experts as they are, "
            "got True; choose one of the two"
        )


def _example(model: HubPathway, example: Tensor | None) -> Tensor | None:
    """Images [2, ...] to watch the parts with: those given, or drawn ones; None: no size known.

    Two, since some networks treat one image alone in another way.
    """
    if example is not None:
        return example[:2] if len(example) > 1 else torch.cat([example, example])
    size, mean = model.origin.input_size, model.input_mean
    if size is None or mean is None:
        return None
    random = torch.Generator().manual_seed(0)
    drawn = torch.rand(2, mean.shape[1], size, size, generator=random)
    return drawn.to(mean)


@torch.no_grad()
def _fold(model: HubPathway, x: Tensor | None) -> dict[str, Folded]:
    """Of each part with BatchNorm, what was folded."""
    labels = [f"experts[{i}] ({label})" for i, label in enumerate(model.origin.labels)]
    parts: dict[str, nn.Module] = dict(zip(labels, model.experts, strict=True))
    parts["generator"] = model.generator
    parts = {name: part for name, part in parts.items() if any(map(is_norm, part.modules()))}
    if x is None:
        why = "no image size is known; give example="
        norms = {
            name: [layer for layer, module in part.named_modules() if is_norm(module)]
            for name, part in parts.items()
        }
        return {name: Folded(0, dict.fromkeys(layers, why)) for name, layers in norms.items()}
    calls = {name: _call(model, part, x) for name, part in parts.items()}
    for name, call in calls.items():  # all of them, before anything is changed
        try:
            call()
        except Exception as error:
            raise ValueError(
                f"example: {name} fails on images {list(x.shape)} ({type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}); give images that the model takes"
            ) from error
    shared = _shared(model)
    # A network may decide by how many images it gets.
    others = (x[:1], torch.cat([x, x[:1]]))
    foldable = {
        name: find_foldable(part, calls[name], shared, [_call(model, part, o) for o in others])
        for name, part in parts.items()
    }
    return {name: found.fold() for name, found in foldable.items()}


def _call(model: HubPathway, part: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        unit = model._unit_images(x)
        if part is model.generator:
            return torch.cat(part(unit), dim=1)
        if model.input_mean is None:
            return part(unit.clone())  # an expert may write to its input
        place = list(model.experts).index(part), slice(None), None, None
        return part((unit - model.input_mean[place]) / model.input_std[place])

    return call


def _shared(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Whether a module, or one of its tensors, can be come to by several ways."""
    ways = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    tensors = Counter(
        id(tensor)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )

    def shared(module: nn.Module) -> bool:
        own = (*module._parameters.values(), *module._buffers.values())
        return ways[id(module)] > 1 or any(tensors[id(t)] > 1 for t in own if t is not None)

    return shared


def _capture(model: HubPathway, image: Tensor) -> bool:
    """Captures what one image's predictions need, of every expert: which K it asks is not known.

    Only ``executor="graphs"`` (or auto, where it takes that) has something to capture.
    """
    count = len(model.experts)
    everyone = FixedRoutes(range(count), [1.0] * count, count).routing(image)

    def step() -> None:
        model.route(image)
        model._outputs(image, everyone)

    with torch.no_grad():
        executor = model._executor(image)
        executor.warm_up(step, image.device)
    return executor.name == "graphs"
