"""Knowledge Flow (Liu, Peng & Schwing, ICLR 2019) for hubs of equal convolutional networks.

A student, a copy of one expert, learns the task while frozen teachers, the pre-trained experts,
help it at L depths. At depth l its layer's output h becomes

    w[l, 0] * h + sum_t w[l, 1 + t] * Q[l, t](h_t),      w[l] = softmax(logits[l])

with h_t teacher t's output at the same depth and Q learned 1x1 convolutions. The loss is

    task + dependency * (- sum_l log w[l, 0]) + keep * distance(now, before the last update)

The second term drives the weights to the student, which stands alone in the end; the third keeps
its outputs steady while its teachers withdraw; its distance is the task's, for classification the
Kullback-Leibler divergence. When evaluating, the student is all that runs.

What the paper leaves open, or what differs, is our choice: the teachers help at the same depth only
(equal networks make the correspondence plain), Q starts as the identity, the student starts as a
pre-trained network with weight OWN, ``dependency`` rises linearly and then stays, and the logits
learn at a rate of their own (see ``knowledge_flow_groups``).

Letters: N samples, M teachers, L depths, C classes or channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_weight
from ..hub import Expert
from ..hub.expert import network
from ..training import Losses, ParameterGroup, Task, TrainerConfig, single_groups
from ..training.objective import batch_mean
from .architectures import difference, tensors_of
from .single import SingleModel
from .stages import channels_of, hooked, layer_outputs, layer_shapes, stage_layers

OWN = 0.5  # the student's weight at every depth before training; the teachers share the rest
RISE = 0.5  # the share of the training over which the dependency's weight rises
LOGIT_TRAVEL = 20.0  # see knowledge_flow_groups


class KnowledgeFlow(nn.Module):
    """The student and its teachers; images uint8 or floats in [0, 1], [N, 3, S, S] -> [N, C].

    Images have as many channels as the experts' normalisation, which for photographs are 3.

    In training the student is helped by its teachers, and the prediction comes from its own head;
    in eval mode it is alone, and no teacher runs.

    Teachers need no gradient, stay in eval mode, and are in no ``state_dict``: they are the experts
    that the model was built from, and would make a checkpoint M times as large. A resumed run must
    be built from the same experts.

    Args:
        experts: the teachers, of one architecture; copied, so that the originals stay as they are.
        student: which one the student starts from, head included.
        layers: names of the layers to help at, within the network, each run once a forward pass
            with an output [n, C, h, w]; None: the outputs of its stages (see ``stage_layers``).

    Raises:
        ValueError: no experts, different architectures, or layers that cannot be mixed.
    """

    def __init__(
        self, experts: Sequence[Expert], student: int = 0, layers: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        experts = list(experts)
        if not experts:
            raise ValueError("experts: expected at least one teacher, got none")
        if not 0 <= student < len(experts):
            raise ValueError(f"student: expected 0..{len(experts) - 1}, got {student}")
        reason = difference([e.module for e in experts], [e.name for e in experts])
        if reason is not None:
            raise ValueError(f"experts: Knowledge Flow needs one architecture, but {reason}")
        # A plain list, so that they are no part of the model.
        self.teachers = [SingleModel(copy.deepcopy(expert)) for expert in experts]
        for teacher in self.teachers:
            teacher.eval().requires_grad_(False)
        own = SingleModel(copy.deepcopy(experts[student]))
        body = network(own.module)
        shapes = layer_shapes(own, body, experts[student].size, len(experts[student].mean))
        names = stage_layers(body, shapes) if layers is None else list(layers)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"layers: expected at least one and none twice, got {names}")
        channels = [channels_of(name, shapes) for name in names]
        self.layers = tuple(names)
        self.flow = Flow(own, self.layers, channels, len(experts))
        # The flow before the last update, in the checkpoint so that a resumed run is the same run.
        self.previous = copy.deepcopy(self.flow).requires_grad_(False)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def student(self) -> SingleModel:
        """The student alone."""
        return self.flow.student

    def weights(self) -> Tensor:
        """[L, 1 + M]: at each depth the weight of the student, then of every teacher."""
        return self.flow.logits.softmax(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return self.student(images)
        return self.flow(images, self.teach(images))

    @torch.no_grad()
    def teach(self, images: Tensor) -> list[list[Tensor]]:
        """What the teachers make of images: for each depth the M outputs [N, C, h, w]."""
        outputs = [
            layer_outputs(teacher, network(teacher.module), self.layers, images)
            for teacher in self.teachers
        ]
        return [list(depth) for depth in zip(*outputs, strict=True)]

    @torch.no_grad()
    def remember(self) -> None:
        """Takes the present parameters and buffers as those before the coming update.

        The objective does so at each update; whoever sets weights by hand does so afterwards.
        """
        old = tensors_of(self.previous)
        for name, tensor in tensors_of(self.flow).items():
            old[name].copy_(tensor)

    def _apply(self, fn: Callable, recurse: bool = True) -> KnowledgeFlow:
        for teacher in self.teachers:  # move with the model, though they are no part of it
            teacher._apply(fn)
        return super()._apply(fn, recurse)


class Flow(nn.Module):
    """The parts that learn: student, projections Q and logits [L, 1 + M]."""

    def __init__(
        self, student: SingleModel, layers: Sequence[str], channels: Sequence[int], teachers: int
    ) -> None:
        super().__init__()
        self.student, self.layers = student, tuple(layers)
        self.projections = nn.ModuleList(
            nn.ModuleList(_identity(width) for _ in range(teachers)) for width in channels
        )
        self.logits = nn.Parameter(start_logits(len(layers), teachers))

    def forward(self, images: Tensor, taught: Sequence[Sequence[Tensor]]) -> Tensor:
        """images [N, 3, S, S] and, for each depth, the teachers' outputs -> logits [N, C]."""
        weights = self.logits.softmax(dim=1)

        def mix(depth: int, own: Tensor) -> Tensor:
            projected = zip(self.projections[depth], taught[depth], strict=True)
            theirs = (_fit(project(outputs), own) for project, outputs in projected)
            return blend(weights[depth], own, theirs)

        body = network(self.student.module)
        with hooked(body, self.layers, lambda depth: lambda _, __, own: mix(depth, own)):
            return self.student(images)


class KnowledgeFlowObjective:
    """The losses of a ``KnowledgeFlow``, for ``Trainer``: see the module's formula.

    Args:
        task: what is learned.
        steps: updates of the whole training.
        dependency: its term's weight, reached after RISE of the steps.
        keep: the weight of the last term; 0 saves a forward pass of the student. The paper tunes
            both weights; the defaults are our choice.
        accumulate: the trainer's.

    Calling it returns ``Losses`` with the parts "task", "dependency" and "keep", none weighted, and
    "own", the geometric mean over depths of the student's weight. What it knows of the past is in
    the model's buffers, so that a resumed run goes on as it would have.

    Raises:
        ValueError: bad arguments.
    """

    def __init__(
        self,
        task: Task,
        steps: int,
        dependency: float = 1.0,
        keep: float = 1.0,
        accumulate: int = 1,
    ) -> None:
        for name, value in (("steps", steps), ("accumulate", accumulate)):
            if value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value}")
        for name, value in (("dependency", dependency), ("keep", keep)):
            check_weight(name, value)
        self.task, self.steps, self.accumulate = task, steps, accumulate
        self.dependency, self.keep = dependency, keep

    def __call__(self, model: KnowledgeFlow, images: Tensor, targets: Any) -> Losses:
        taught = model.teach(images)
        outputs = model.flow(images, taught)
        task = batch_mean(self.task.loss(outputs, targets))
        log_own = model.flow.logits.log_softmax(dim=1)[:, 0]
        dependency = -log_own.sum()
        keep = self._change(model, images, taught, outputs)
        # From 0 to 1, by the batches that the model has seen.
        rise = rise_of(model.batches, self.steps * self.accumulate)
        total = task + self.dependency * rise * dependency + self.keep * keep
        model.batches += 1
        own = log_own.mean().exp()
        return Losses(total, {"task": task, "dependency": dependency, "keep": keep, "own": own})

    def _change(self, model: KnowledgeFlow, images: Tensor, taught, outputs: Tensor) -> Tensor:
        """The distance to the outputs before the last update, the mean over the batch.

        The earlier flow runs in the model's mode, since BatchNorm's batch statistics are what the
        prediction now was made with.
        """
        if self.keep == 0:
            return model.flow.logits.new_zeros(())
        with torch.no_grad():
            before = model.previous(images, taught)
        change = self.task.distance(outputs, before).mean()
        # The update follows the last micro-batch. (Reading the count makes a GPU wait.)
        if self.accumulate == 1 or int(model.batches) % self.accumulate == self.accumulate - 1:
            model.remember()
        return change


def knowledge_flow_groups(model: KnowledgeFlow, config: TrainerConfig) -> list[ParameterGroup]:
    """Groups: the student's body and head, the projections (``lr_router``), and the logits.

    The logits' rate is LOGIT_TRAVEL / steps. An update of Adam is at most about the rate, whatever
    the gradient, so that at ``lr_router`` a short training could not bring the weights to the
    student; at this rate logits can move by about LOGIT_TRAVEL / 2 over a training of any length,
    and softmax needs a difference of some 7 to give one of six a weight of 0.995.
    """
    return [
        *single_groups(model.student, config),
        ParameterGroup("projections", list(model.flow.projections.parameters()), config.lr_router),
        ParameterGroup("weights", [model.flow.logits], LOGIT_TRAVEL / config.steps),
    ]


def start_logits(depths: int, teachers: int) -> Tensor:
    """[L, 1 + M]: softmax gives the student OWN, and the teachers equal shares of the rest."""
    logits = torch.zeros(depths, 1 + teachers)
    logits[:, 0] = math.log(OWN / (1 - OWN) * teachers)
    return logits


def blend(weights: Tensor, own: Tensor, theirs: Iterable[Tensor]) -> Tensor:
    """The formula of a depth: weights [1 + M], the student's output and the teachers' projected."""
    mixed = weights[0] * own
    for t, output in enumerate(theirs):
        mixed = mixed + weights[1 + t] * output
    return mixed


def rise_of(done: Tensor, steps: int) -> Tensor:
    """The share of the dependency's weight after ``done`` of all steps, from 0 to 1."""
    return (done / (RISE * steps)).clamp(max=1)


def _identity(width: int) -> nn.Conv2d:
    layer = nn.Conv2d(width, width, 1, bias=False)
    nn.init.dirac_(layer.weight)
    return layer


def _fit(theirs: Tensor, own: Tensor) -> Tensor:
    """Teachers that work at another size than the student give maps of another size."""
    if theirs.shape[2:] == own.shape[2:]:
        return theirs
    return F.interpolate(theirs, own.shape[2:], mode="bilinear", align_corners=False)
