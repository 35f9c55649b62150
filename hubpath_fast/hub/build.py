"""From names to experts: everything that can be wrong is reported at once, before any download."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn

from ..devices import to_meta
from ..model.batch_norm import batch_norm_problems
from ..model.heads import set_lr_factor, split_parameters
from .dense import DenseNetwork
from .errors import HubError
from .expert import Expert, Resized, RunningStatistics, has_nan
from .labels import expert_names
from .registry import find
from .source import (
    HeadTask,
    HubModel,
    PlainTask,
    outputs_refusal,
    refusal,
    skeleton,
    training_refusal,
    with_head,
    wrong_size,
)
from .spec import ExpertSpec, read_specs
from .weights import fetch_all

DEFAULT_SIZE = 224  # of a hub whose networks do not say what they were trained at

Names = str | Sequence[str | ExpertSpec | nn.Module]


def default_input_size(names: Names) -> int:
    """Pixels a side that suit a hub: what most of its models were pre-trained at.

    Among equally frequent sides the smallest, since cost grows with the square of the side.

    Raises:
        HubError: every name that is wrong.
    """
    return _usual_size(check_names(read_specs(names)))


def check_names(specs: Sequence[ExpertSpec]) -> list[HubModel | None]:
    """The models, None for modules; HubError with every name that is wrong."""
    models, problems = _find_all(specs)
    if problems:
        raise HubError(*problems)
    return models


def build_experts(
    names: Names,
    num_outputs: int,
    pretrained: bool = True,
    input_size: int | None = None,
    resize_to_native: bool = False,
    task: HeadTask | None = None,
    own: Container[int] | None = None,
) -> list[Expert]:
    """Builds a hub.

    A network takes images of input_size as they are wherever its architecture can. One that was
    built for its native size alone resizes them inside, as does one whose spec says a size.

    Args:
        names: what to build, in order; one may occur more than once. Each is a name (see
            ``registry``), with options or without, a hub's name, an ``ExpertSpec``, or a module of
            your own, which must have its head already.
        num_outputs: C, outputs of each head.
        pretrained: load the weights that the name stands for, from the local cache or else the
            network; False: random weights, no network, and local files are not read.
        input_size: pixels a side of the images that the hub will be given; None:
            ``default_input_size(names)``.
        resize_to_native: every network resizes the images to its native size.
        task: what attaches a head of its own to each network once its weights are loaded, and says
            what shape an image's outputs then have; None: C numbers an image, from the head of
            each network's own library.
        own: numbers of the experts that this process has, of those that go by a name; None: all.
            The others are on the meta device, names and shapes alone: their weights are neither
            fetched nor read, and at most one of them is in memory at a time, while it is made. New
            heads and random weights are what they would be in one process.

    Raises:
        HubError: all problems of the hub, before anything is downloaded: unknown names (with the
            closest), names without weights, networks that cannot take the input size (with sizes
            that they take) or give other outputs than the task's, local or cached files that hold
            something else; and then weights that cannot be fetched (which, from where, to where).
    """
    task = task or PlainTask(num_outputs)
    for name, value in (("num_outputs", num_outputs), ("input_size", input_size)):
        if value is not None and value < 1:
            raise HubError(f"{name}: expected an integer of at least 1, got {value}")
    if task.num_outputs != num_outputs:
        raise HubError(f"num_outputs: expected the task's {task.num_outputs}, got {num_outputs}")
    specs = read_specs(names)
    models, problems = _find_all(specs)
    if input_size is None:
        input_size = _usual_size(models)
    sizes = []
    for i, (spec, model) in enumerate(zip(specs, models, strict=True)):
        if model is None and not isinstance(spec.name, nn.Module):
            continue  # unknown, and reported
        try:
            size = spec.size or (
                model.native_size if model is not None and resize_to_native else input_size
            )
            network = spec.name if model is None else skeleton(model, task)
            # First: such a layer may refuse the images that the network is tried with.
            layers = [*batch_norm_problems([(f"expert {i} ({spec.label})", network)])]
            problems += layers
            if not layers:
                sizes.append(working_size(spec, model, task, size, input_size))
        except HubError as error:
            problems += error.problems
        if pretrained and model is not None and (own is None or i in own):
            problems += _without_weights(model)
    if problems:
        raise HubError(*problems)

    # All networks first: their new heads are drawn alike, whatever lies in the cache.
    experts: list[Expert] = []
    there: set[int] = set()  # numbers of those that other processes have
    for i, (spec, model, size) in enumerate(zip(specs, models, sizes, strict=True)):
        experts.append(start_expert(spec, model, task, size))
        if own is not None and i not in own and model is not None:
            there.add(i)
            to_meta([experts[-1].module])
    if pretrained:
        load_all([expert for i, expert in enumerate(experts) if i not in there])
    for i, (expert, label) in enumerate(zip(experts, expert_names(specs), strict=True)):
        finish_expert(expert, task, input_size, label)
        if i in there:
            to_meta([expert.module])  # its head, which is new
    return experts


def normalization(experts: Sequence[Expert]) -> tuple[Tensor, Tensor]:
    """(mean, std) of the experts' images, float32 [M, 3] each, in units of images in [0, 1]."""
    mean = torch.tensor([expert.mean for expert in experts])
    return mean, torch.tensor([expert.std for expert in experts])


def _find_all(specs: Sequence[ExpertSpec]) -> tuple[list[HubModel | None], list[str]]:
    """The models, None for modules and for names that are wrong, and what is wrong with those."""
    models: list[HubModel | None] = []
    problems: list[str] = []
    for spec in specs:
        model = None
        if isinstance(spec.name, str):
            try:
                model = find(spec)
            except HubError as error:
                problems += error.problems
        models.append(model)
    return models, problems


def _usual_size(models: Sequence[HubModel | None]) -> int:
    counts = Counter(model.native_size for model in models if model is not None)
    return min(counts, key=lambda size: (-counts[size], size), default=DEFAULT_SIZE)


def _without_weights(model: HubModel) -> list[str]:
    if model.weights is None:
        return [
            f"{model.name} has no pre-trained weights; take another name, or random weights for "
            "all with pretrained=False (--no-pretrained)"
        ]
    problem = model.weights.problem()
    return [] if problem is None else [problem]


def working_size(
    spec: ExpertSpec,
    model: HubModel | None,
    task: HeadTask,
    size: int,
    image_size: int | None = None,
) -> int:
    """The side that a network works at; HubError if it can take neither ``size`` nor its own, or
    gives something else in training. image_size: of the images before they are resized."""
    if model is None:
        for training in (False, True):
            reason = outputs_refusal(spec.name, task, size, image_size, training)
            if reason is not None:
                expected = task.expected_shape(image_size or size)
                outputs = ", ".join(map(str, ["n", *expected]))
                way = "" if training else _remedy(spec.name)
                raise HubError(
                    f"the module {spec.label} does not map images [n, 3, {size}, {size}] to "
                    f"[{outputs}] ({reason}){way}"
                )
        nan = [name for name, tensor in spec.name.state_dict().items() if has_nan(tensor)]
        if nan:
            raise HubError(
                f"the module {spec.label} holds NaN, as after a training that diverged, in "
                f"{len(nan)} tensors, the first {nan[0]}; load other weights into it"
            )
        return size
    reason = refusal(model, task, size, image_size)
    if reason is None:
        reason = training_refusal(model, task, size, image_size)
        if reason is not None:
            raise HubError(f"{model.name} cannot be trained at {size} x {size}: {reason}")
        return size
    if model.fixed_size and size != model.native_size and spec.size is None:
        return working_size(spec, model, task, model.native_size, image_size)
    raise wrong_size(model, task, size, reason)


def _remedy(module: nn.Module) -> str:
    """What to do about a module that does not give what the task needs."""
    types = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    if types and torch.float32 not in types:
        found = ", ".join(str(t) for t in sorted(types, key=str))
        return f"; its weights are {found}, and its images float32: module.float()"
    return "; replace its head, or say a size"


def start_expert(spec: ExpertSpec, model: HubModel | None, task: HeadTask, size: int) -> Expert:
    """A network as its own library makes it, which weights can be loaded into; ``finish_expert``
    makes it the expert that its spec asks for. size: pixels a side that it works at."""
    if model is not None:
        module = model.make(task.num_outputs)
        images = model.mean, model.std, size, model.interpolation
        return Expert(model.name, module, *images, model, task, spec=spec)
    mean, std = _own_normalization(spec.name)
    return Expert(spec.label, spec.name, spec.mean or mean, spec.std or std, size, spec=spec)


def finish_expert(expert: Expert, task: HeadTask, input_size: int, label: str) -> None:
    """Attaches the task's head, and makes a network the expert that its spec asks for."""
    expert.label = label
    if expert.model is not None:
        expert.module = with_head(expert.module, task)
    _prepare(expert, expert.spec, input_size)


def _own_normalization(module: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that a timm network states; else those that leave images in [0, 1] alone."""
    cfg = getattr(module, "pretrained_cfg", None) or {}
    if "mean" in cfg and "std" in cfg:
        return tuple(cfg["mean"]), tuple(cfg["std"])
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def load_all(experts: Sequence[Expert]) -> None:
    """Loads what lies on this machine, says all that is wrong with it, and only then downloads."""
    named = [(expert, expert.model) for expert in experts if expert.model is not None]
    missing, problems = [], []
    for expert, model in named:
        path = model.weights.cached()
        if path is None:
            missing.append((expert, model))
            continue
        try:
            model.load(expert, path)
        except HubError as error:
            problems += error.problems
    if problems:
        raise HubError(*problems)
    paths = fetch_all([model.weights for _, model in missing])
    for (expert, model), path in zip(missing, paths, strict=True):
        model.load(expert, path)


def _prepare(expert: Expert, spec: ExpertSpec, input_size: int) -> None:
    body, head = split_parameters(expert.module)
    frozen = {"none": [], "body": body, "all": [*body, *head]}[spec.freeze]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if spec.running_statistics:
        expert.module = RunningStatistics(expert.module)
    if expert.size != input_size:
        if isinstance(expert.body, DenseNetwork):
            expert.body.image_size = input_size
        expert.module = Resized(expert.module, expert.size, expert.interpolation)
    if spec.lr_factor != 1:
        set_lr_factor(expert.module, spec.lr_factor)
