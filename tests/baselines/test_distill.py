"""Distillation against a loop over samples, and what teachers may be."""

import copy

import pytest
import torch
from support.images import RandomImages, check_resuming
from support.training import QUIET
from torch import nn

from hubpath_fast.baselines.distill import DistillObjective
from hubpath_fast.baselines.single import SingleModel
from hubpath_fast.hub import build_experts
from hubpath_fast.tasks import Classification
from hubpath_fast.training import SingleObjective, Trainer, TrainerConfig

N, FEATURES, CLASSES = 5, 4, 3
TASK = Classification(("a", "b", "c"))


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.5, 0.7), (3.0, 0)])
def test_weights_learn_what_a_loop_over_samples_says(temperature, weight):
    """In float64: what is left is rounding, some 1e-15 of values around 1."""
    torch.manual_seed(0)
    student = nn.Linear(FEATURES, CLASSES).double()
    teachers = [nn.Linear(FEATURES, CLASSES).double() for _ in range(2)]
    x, y = torch.randn(N, FEATURES, dtype=torch.float64), torch.arange(N) % CLASSES
    twin, task, distill = copy.deepcopy(student), 0, 0
    for n in range(N):
        z = twin(x[n])
        p = sum((t(x[n]).detach() / temperature).softmax(0) for t in teachers) / 2
        q = (z / temperature).softmax(0)
        kl = sum(p[c] * (p[c] / q[c]).log() for c in range(CLASSES))
        task = task - z.log_softmax(0)[y[n]] / N
        distill = distill + temperature**2 * kl / N
    total = (1 - weight) * task + weight * distill
    total.backward()
    losses = DistillObjective(TASK, teachers, temperature, weight)(student, x, y)
    losses.total.backward()
    found = (losses.total, losses.parts["task"], losses.parts["distill"])
    torch.testing.assert_close(found, (total, task, distill), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(student.weight.grad, twin.weight.grad, rtol=1e-11, atol=1e-14)


def test_teachers_neither_learn_nor_leave_eval_mode():
    """A BatchNorm in training mode would move its statistics, and a gradient would be kept."""
    teacher = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES))
    before = copy.deepcopy(teacher.state_dict())
    objective = DistillObjective(TASK, [teacher])
    teacher.train()  # as a careless caller may leave it
    student = nn.Linear(FEATURES, CLASSES)
    x, y = torch.randn(N, FEATURES) + 5, torch.zeros(N, dtype=torch.int64)
    objective(student, x, y).total.backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert student.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teachers": []}, "teachers: expected at least one module, got none"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "2"}, "temperature: expected a finite number above 0, got '2'"),
        ({"weight": 1.5}, "weight"),
        ({"weight": float("nan")}, "weight: expected a number from 0 to 1, got nan"),
        ({"weight": None}, "weight: expected a number from 0 to 1, got None"),
        ({"weight": -0.1}, "weight"),
    ],
)
def test_bad_arguments(changes, match):
    with pytest.raises(ValueError, match=match):
        DistillObjective(TASK, **{"teachers": [nn.Linear(1, 2)], **changes})


def test_an_empty_batch_is_refused():
    x, y = torch.randn(0, FEATURES), torch.zeros(0, dtype=torch.int64)
    student, teacher = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
    for objective in (DistillObjective(TASK, [teacher]), SingleObjective(TASK.loss)):
        with pytest.raises(ValueError, match=r"losses: empty batch, shape \[0\]"):
            objective(student, x, y)


def test_networks_that_disagree_are_refused():
    x, y = torch.randn(N, FEATURES), torch.zeros(N, dtype=torch.int64)
    three, four = nn.Linear(FEATURES, 3), nn.Linear(FEATURES, 4)
    with pytest.raises(ValueError, match=r"expected outputs of one shape, got \[5, 3\], \[5, 4\]"):
        DistillObjective(TASK, [three, four])(nn.Linear(FEATURES, 3), x, y)
    with pytest.raises(
        ValueError, match=r"expected outputs \[5, 3\] as the student's, got \[5, 4\]"
    ):
        DistillObjective(TASK, [four])(nn.Linear(FEATURES, 3), x, y)
    with pytest.raises(ValueError, match="number 1 shares parameters"):
        DistillObjective(TASK, [nn.Linear(FEATURES, 3), three])(three, x, y)


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    def make(folder, resume):
        torch.manual_seed(0)
        experts = build_experts(["test_resnet"] * 3, 4, pretrained=False, input_size=32)
        student, *teachers = map(SingleModel, experts)
        objective = DistillObjective(TASK, teachers)
        config = TrainerConfig(steps=5, batch_size=6)
        options = {"task": TASK, "reporting": QUIET, "resume": resume}
        return Trainer(student, objective, RandomImages(), config, folder, **options)

    whole, result = check_resuming(make, tmp_path, stop=2)
    assert {"task", "distill"} < result.history[-1].keys()
    assert len(whole.model.state_dict()) == len(whole.objective.teachers[0].state_dict())
