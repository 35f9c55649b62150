"""What is trained: from a problem's experts to a trained model, a function for each kind of method.

A run lies in ``OUT/runs/seed-S/NAME`` (with its rate behind the name where rates are tried): the
trainer's files, and at its end ``outputs.safetensors`` and ``result.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from ..baselines import (
    DistillObjective,
    Ensemble,
    KnowledgeFlow,
    KnowledgeFlowObjective,
    SingleModel,
    ZooTuning,
    greedy_soup,
    knowledge_flow_groups,
    reestimate_batchnorm,
    uniform_soup,
    zoo_tuning_groups,
)
from ..hub import Expert
from ..model import HubPathway
from ..runs.build import make_pathway
from ..runs.warm_up import warm_up_heads
from ..training import (
    PathwayObjective,
    Reporting,
    SingleObjective,
    Task,
    Trainer,
    evaluate,
    load_weights,
)
from .problems import Problem
from .results import SeedResults

SOUP_BATCHES = 20  # training batches that a soup's BatchNorm statistics are estimated on


@dataclass
class Context:
    """What a run may use. folder: its own. rate: the peak rate of bodies. results: of its seed.
    length: of its training, see ``Method``. seconds: of training, heads first included.
    warm_up_forwards: of experts, for heads first.
    """

    problem: Problem
    folder: Path
    rate: float
    results: SeedResults
    length: Fraction = Fraction(1)
    seconds: float = 0.0
    steps: int = 0  # updates that were taken
    warm_up_forwards: int = 0

    @property
    def task(self) -> Task:
        return self.problem.task

    def train(self, model: nn.Module, objective, groups: Callable | None = None) -> nn.Module:
        """Trains within the common budget, from where an earlier call was stopped if it was. The
        weights of the last step are kept: nothing is chosen among steps.

        Where the settings say heads first, those of an expert alone (a student among them) and of a
        Hub-Pathway are trained first; other methods' networks have no such heads.

        Raises InterruptedError if a signal stops it.
        """
        config = self.problem.settings.trainer(self.problem.seed, self.rate, self.length)
        routed = isinstance(model, HubPathway)  # its curves are what reports show
        names = self.problem.expert_names if routed else None
        trainer = Trainer(
            model,
            objective,
            self.problem.stream(),
            config,
            self.folder,
            task=self.task,
            groups=None if groups is None else groups(model, config),
            validation=self.problem.batches("validation") if routed else None,
            resume=True,
            keep_best=False,
            reporting=Reporting(Console(quiet=True), expert_names=names, tensorboard=False),
        )
        warm_up = self.problem.fit.warm_up
        if warm_up and type(model) in (HubPathway, SingleModel):
            # A student's head first learns from the targets, as any expert's alone.
            alone = objective if routed else SingleObjective(self.task.loss)
            images = self.problem.batches("train")
            warmed = warm_up_heads(trainer, alone, images, warm_up, resume=True, names=names)
            if warmed.interrupted:
                raise InterruptedError(f"stopped while training heads in {self.folder}")
            self.seconds, self.warm_up_forwards = warmed.seconds, warmed.forwards
        result = trainer.fit()
        if result.interrupted:
            raise InterruptedError(f"stopped while training in {self.folder}")
        self.seconds += result.seconds
        self.steps = result.steps
        return model

    def singles(self, chosen: Sequence[int] | None = None) -> list[SingleModel]:
        """Experts alone, fine-tuned, as their own runs left them. chosen: which; None: all."""
        experts = self.problem.experts(chosen)
        chosen = range(len(experts)) if chosen is None else chosen
        return [self._fine_tuned(i, experts[i]) for i in chosen]

    def _fine_tuned(self, index: int, expert: Expert) -> SingleModel:
        model = SingleModel(expert)
        load_weights(model, self.results.folder(f"single-{index}") / "last")
        return model.to(self.problem.fit.trainer.device)

    def hub_pathway(self, k: int | None = None) -> HubPathway:
        problem = self.problem
        outputs = problem.task.num_outputs
        return make_pathway(problem.fit, problem.experts(), outputs, problem.size, k)


@dataclass
class Constant:
    """What says the same of every sample: prediction [P], as the task stores them."""

    prediction: Tensor


def mean_shape(context: Context) -> Constant:
    """The mean of the training faces, as an answer to everything: what nothing learned is worth."""
    points = context.problem.mean_shape().float()
    return Constant(torch.cat([points, torch.ones(len(points), 1)], dim=1))


def from_scratch(context: Context) -> nn.Module:
    """The hub's first network alone, with random weights."""
    return context.train(
        SingleModel(context.problem.untrained()), SingleObjective(context.task.loss)
    )


def ensemble(context: Context, members: Callable[[SeedResults], Sequence[int]]) -> nn.Module:
    """The fine-tuned experts, as one that says the mean of their outputs; nothing is trained."""
    return Ensemble(context.singles(members(context.results)), context.task)


def single(context: Context, index: int) -> nn.Module:
    model = SingleModel(context.problem.expert(index))
    return context.train(model, SingleObjective(context.task.loss))


def distill(context: Context) -> nn.Module:
    """The fine-tuned experts teach the one that is best alone, from its pre-trained weights."""
    student = SingleModel(context.problem.expert(context.results.best_singles()[0]))
    settings = context.problem.settings
    objective = DistillObjective(
        context.task, context.singles(), settings.temperature, settings.distill_weight
    )
    return context.train(student, objective)


def soup(context: Context, greedy: bool) -> nn.Module:
    """One model of the fine-tuned experts' averaged weights; no further training."""
    singles = context.singles()
    model, states = singles[0], [s.state_dict() for s in singles]

    def refreshed(state) -> SingleModel:
        model.load_state_dict(state)
        reestimate_batchnorm(model, context.problem.stream().batches(0), SOUP_BATCHES)
        return model

    if not greedy:
        return refreshed(uniform_soup(states))
    metric = context.task.metric

    def score(state) -> float:
        batches = context.problem.batches("validation")
        return evaluate(refreshed(state), batches, context.task)[metric.name]

    alone = [context.results.result(f"single-{i}") for i in range(len(states))]
    scores = [result["validation"][metric.name] for result in alone]
    state, _ = greedy_soup(states, score, metric, scores)
    return refreshed(state)


def knowledge_flow(context: Context) -> nn.Module:
    trainer = context.problem.fit.trainer
    model = KnowledgeFlow(context.problem.experts(), context.results.best_singles()[0])
    objective = KnowledgeFlowObjective(context.task, trainer.steps, accumulate=trainer.accumulate)
    return context.train(model, objective, knowledge_flow_groups).student


def zoo_tuning(context: Context, lite: bool) -> nn.Module:
    model = ZooTuning(context.problem.experts(), lite=lite)
    context.train(model, SingleObjective(context.task.loss), zoo_tuning_groups)
    return model.merged() if lite else model


def pathway(
    context: Context,
    k: int | None = None,
    explore: bool = True,
    exploit: bool = True,
    generator: Callable[[HubPathway], nn.Module] | None = None,
) -> nn.Module:
    """A Hub-Pathway, or one without one of its losses. k: in place of the hub's own. generator:
    makes another one from the model; None: its own."""
    model = context.hub_pathway(k)
    if generator is not None:
        model.generator = generator(model)
    fit = context.problem.fit
    weight = fit.explore if explore else 0.0
    # Nothing to compare with one active expert, nothing to learn without a parameter.
    teachable = model.k > 1 and any(True for _ in model.generator.parameters())
    more = fit.supervision if teachable else {}
    return context.train(model, PathwayObjective(context.task.criterion(weight, exploit, **more)))
