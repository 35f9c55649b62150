"""A task that nothing in the package knows of goes through everything: points in the plane."""

import copy
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from support.training import QUIET
from torch import nn

from hubpath_fast.baselines import DistillObjective, greedy_soup, oracle
from hubpath_fast.measure import Measure
from hubpath_fast.model import HubPathway, HubPathwayLoss, PathwayGenerator
from hubpath_fast.training import PathwayObjective, SingleObjective, Trainer, TrainerConfig


class Points:
    """A point [N, 2] for each image; judged by the mean distance from it, to be small."""

    name, num_outputs = "points", 2
    metric = Measure("error", "min", (0.0, None), unit="px", decimals=2)
    votes = MappingProxyType({"soft": lambda points: points.mean(0)})

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum(1)

    def criterion(self, explore, exploit=True):
        return HubPathwayLoss(self.loss, explore, exploit=exploit)

    def ensemble(self, outputs, temperature=1.0):
        return outputs.mean(0)

    def distance(self, student, teacher, temperature=1.0):
        return (student - teacher.detach()).square().sum(1)

    def meter(self, device):
        return PointsMeter(self)

    def predict(self, outputs):
        return outputs.float()

    def scores(self, predictions, targets):
        return (predictions - targets).double().norm(dim=1)

    def results(self, predictions, targets):
        return {"error": self.scores(predictions, targets).mean().item()}


class PointsMeter:
    def __init__(self, task):
        self.task, self.errors = task, []

    def add(self, outputs, targets):
        self.errors += self.task.scores(outputs, targets).tolist()

    def result(self):
        return {"error": sum(self.errors) / len(self.errors), "n": len(self.errors)}


TASK = Points()


def batch(step, n=16):
    """The brighter the red and the green of an image, the further out its point."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, 8, 8)
    noise = 0.05 * torch.randn(n, 2, generator=generator)
    return images, 2 * images[:, :2, 0, 0] - 1 + noise


class Stream:
    def batches(self, start_step):
        while True:
            yield batch(start_step)
            start_step += 1


VALIDATION = [batch(1000 + i) for i in range(3)]


def expert(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


def pathway():
    experts = [expert(seed) for seed in range(3)]
    return HubPathway(experts, PathwayGenerator(3, width=4, stride=2), k=2)


def fit(model, objective, folder, steps=80, reporting=QUIET):
    config = TrainerConfig(
        steps=steps, batch_size=16, lr_expert=0.05, eval_every=10, log_every=10, save_every=0
    )
    trainer = Trainer(
        model, objective, Stream(), config, folder, task=TASK, validation=VALIDATION,
        reporting=reporting,
    )  # fmt: skip
    return trainer, trainer.fit()


def predictions(model):
    model.eval()
    with torch.no_grad():
        return torch.cat([TASK.predict(model(images)) for images, _ in VALIDATION])


TARGETS = torch.cat([points for _, points in VALIDATION])


def error(model):
    return TASK.results(predictions(model), TARGETS)["error"]


def check_best(trainer, result):
    """The best step is that of the smallest error, and its weights are the ones that come back."""
    errors = {r["step"]: r["validation"]["error"] for r in result.history if "validation" in r}
    assert len(errors) == 8
    assert result.best_step == min(errors, key=errors.get)
    assert result.best_metric == min(errors.values()) < 0.5 * errors[10]
    trainer.load_best()
    # float32 outputs of some 1, in the same batches: not even the order of a sum differs.
    assert error(trainer.model) == pytest.approx(result.best_metric, rel=1e-12)


def test_a_single_model_and_a_hub_pathway_learn_it(tmp_path):
    trainer, result = fit(expert(0), SingleObjective(TASK.loss), tmp_path / "single")
    check_best(trainer, result)
    objective = PathwayObjective(TASK.criterion(explore=0.5))
    named = replace(QUIET, expert_names=["a", "b", "c"])
    trainer, result = fit(pathway(), objective, tmp_path / "pathway", reporting=named)
    check_best(trainer, result)
    assert {"task", "explore", "exploit", "load"} < result.history[-1].keys()


def test_it_is_distilled_averaged_and_voted_on(tmp_path):
    singles = [expert(seed) for seed in range(3)]
    for i, model in enumerate(singles):
        fit(model, SingleObjective(TASK.loss), tmp_path / str(i), steps=40)
    teachers = [copy.deepcopy(model) for model in singles]
    trainer, result = fit(expert(7), DistillObjective(TASK, teachers), tmp_path / "distilled")
    check_best(trainer, result)
    assert result.history[-1]["distill"] < 0.5 * result.history[0]["distill"]

    said = torch.stack([predictions(model) for model in singles])
    ensemble = TASK.votes["soft"](said)
    torch.testing.assert_close(ensemble, said.sum(0) / 3)
    best = oracle(TASK, said, TARGETS)
    by_hand = [min((model[n] - TARGETS[n]).double().norm().item() for model in said)
               for n in range(len(TARGETS))]  # fmt: skip
    assert best.tolist() == pytest.approx(by_hand, rel=1e-6)

    errors = [error(model) for model in singles]
    assert TASK.metric.ranked(errors)[0] == errors.index(min(errors))
    soup = copy.deepcopy(singles[0])

    def score(state):
        soup.load_state_dict(state)
        return error(soup)

    state, chosen = greedy_soup([model.state_dict() for model in singles], score, TASK.metric)
    assert chosen[0] == errors.index(min(errors))
    assert score(state) <= min(errors)
