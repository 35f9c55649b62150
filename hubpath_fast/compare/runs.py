"""What is trained: one function a kind of run, from a problem's experts to a trained model.

A run lies in ``OUT/runs/seed-S/NAME`` (with its rate behind the name where rates are tried): the
trainer's files, and at its end ``outputs.safetensors`` and ``result.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import nn

from ..baselines import (
    DistillObjective,
    KnowledgeFlow,
    KnowledgeFlowObjective,
    Noiseless,
    RandomGenerator,
    SingleModel,
    TaskGenerator,
    ZooTuning,
    greedy_soup,
    knowledge_flow_groups,
    reestimate_batchnorm,
    uniform_soup,
    zoo_tuning_groups,
)
from ..hub import Expert
from ..model import HubPathway
from ..runs.build import make_pathway, make_task
from ..tasks import Classification
from ..training import (
    PathwayObjective,
    Reporting,
    SingleObjective,
    Trainer,
    evaluate,
    load_weights,
)
from ..training.random_state import seed_all
from .plan import Job
from .problems import Problem
from .results import SeedResults
from .settings import CompareSettings

SOUP_BATCHES = 20  # training batches that a soup's BatchNorm statistics are estimated anew on


@dataclass
class Context:
    """What a run may use. folder: its own. rate: the peak rate of bodies. results: of its seed."""

    problem: Problem
    settings: CompareSettings
    job: Job
    folder: Path
    rate: float
    results: SeedResults
    console: Console
    seconds: float = 0.0  # of training steps

    @property
    def seed(self) -> int:
        return self.job.seed

    @property
    def task(self) -> Classification:
        return make_task(self.problem.fit, self.problem.classes)

    def train(self, model: nn.Module, objective, groups: Callable | None = None) -> nn.Module:
        """Trains for the common budget, from where an earlier call was stopped if it was. The
        weights of the last step are kept: nothing is chosen among steps.

        Raises InterruptedError if a signal stops it.
        """
        config = self.settings.trainer(self.seed, self.rate)
        is_pathway = isinstance(model, HubPathway)
        trainer = Trainer(
            model,
            objective,
            self.problem.stream(),
            config,
            self.folder,
            groups=None if groups is None else groups(model, config),
            task=self.task,
            validation=self.problem.batches("validation"),
            resume=True,
            reporting=Reporting(
                self.console,
                self.job.run,
                self.problem.expert_names if is_pathway else None,
                tensorboard=False,
            ),
        )
        result = trainer.fit()
        if result.interrupted:
            raise InterruptedError(f"stopped while training {self.job.run}")
        self.seconds = result.seconds
        return model

    def single(self, index: int) -> SingleModel:
        """An expert alone, only pre-trained."""
        return SingleModel(self.problem.experts()[index])

    def singles(self) -> list[SingleModel]:
        """Every expert alone, fine-tuned, as its own run left it."""
        return [self._fine_tuned(i, expert) for i, expert in enumerate(self.problem.experts())]

    def _fine_tuned(self, index: int, expert: Expert) -> SingleModel:
        model = SingleModel(expert)
        load_weights(model, self.results.folder(f"single-{index}") / "last")
        return model.to(self.settings.fit.trainer.device)

    def best_single(self) -> int:
        """The expert that is best alone, on validation data."""
        return self.results.best_singles()[0]

    def pathway(self, k: int | None = None) -> HubPathway:
        problem = self.problem
        return make_pathway(problem.fit, problem.experts(), problem.num_classes, problem.size, k)

    def pathway_objective(self, explore: bool = True, exploit: bool = True) -> PathwayObjective:
        weight = self.settings.fit.explore if explore else 0.0
        return PathwayObjective(self.task.criterion(weight, exploit))


def single(context: Context, index: int) -> nn.Module:
    return context.train(context.single(index), SingleObjective(context.task.loss))


def distill(context: Context) -> nn.Module:
    """The fine-tuned experts teach the one that is best alone, from its pre-trained weights."""
    student = context.single(context.best_single())
    settings = context.settings
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
    trainer = context.settings.fit.trainer
    model = KnowledgeFlow(context.problem.experts(), context.best_single())
    objective = KnowledgeFlowObjective(context.task, trainer.steps, accumulate=trainer.accumulate)
    return context.train(model, objective, knowledge_flow_groups).student


def zoo_tuning(context: Context, lite: bool) -> nn.Module:
    model = ZooTuning(context.problem.experts(), lite=lite)
    context.train(model, SingleObjective(context.task.loss), zoo_tuning_groups)
    return model.merged() if lite else model


def pathway(context: Context, k: int | None = None, **losses: bool) -> nn.Module:
    return context.train(context.pathway(k), context.pathway_objective(**losses))


def other_generator(context: Context, make: Callable[[HubPathway], nn.Module]) -> nn.Module:
    """A Hub-Pathway with another generator, made from it."""
    model = context.pathway()
    model.generator = make(model)
    return context.train(model, context.pathway_objective())


RUNS: dict[str, Callable[[Context], nn.Module]] = {
    "distill": distill,
    "soup-uniform": lambda context: soup(context, greedy=False),
    "soup-greedy": lambda context: soup(context, greedy=True),
    "knowledge-flow": knowledge_flow,
    "zoo-tuning": lambda context: zoo_tuning(context, lite=False),
    "zoo-tuning-lite": lambda context: zoo_tuning(context, lite=True),
    "pathway": pathway,
    "random-pathway": lambda context: other_generator(
        context, lambda model: RandomGenerator(len(model.experts), model.k)
    ),
    "without-explore": lambda context: pathway(context, explore=False),
    "without-exploit": lambda context: pathway(context, exploit=False),
    "task-pathway": lambda context: other_generator(
        context, lambda model: TaskGenerator(len(model.experts))
    ),
    "noise-off": lambda context: other_generator(context, lambda model: Noiseless(model.generator)),
}
NUMBERED = {"single": single, "pathway-k": pathway}


def train_run(context: Context) -> nn.Module:
    """Does what the run's name says, from freshly seeded random generators."""
    seed_all(context.seed)
    name = context.job.run
    if name in RUNS:
        return RUNS[name](context)
    kind, number = re.fullmatch(r"(single|pathway-k)-?(\d+)", name).groups()
    return NUMBERED[kind](context, int(number))
