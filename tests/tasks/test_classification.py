"""Classification against numpy and against cases worked out by hand."""

import numpy as np
import pytest
import torch

from hubpath_fast.measure import Measure
from hubpath_fast.tasks import Classification
from hubpath_fast.training import Task

CLASSES, N = 3, 5
TASK = Classification(("a", "b", "c"))

# Three models, four samples, three classes.
PROBABILITIES = torch.tensor(
    [
        [[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]],
        [[0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.0, 0.9, 0.1], [0.1, 0.8, 0.1]],
        [[0.4, 0.6, 0.0], [1.0, 0.0, 0.0], [0.0, 0.4, 0.6], [0.3, 0.3, 0.4]],
    ]
)


def log_softmax(z, axis=1):
    shifted = z - z.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def as_map(values):
    """[N, ...] -> [N, ..., 1, 2], maps of two positions; at the second the samples reversed."""
    return torch.stack([values, values.flip(0)], dim=-1)[..., None, :]


def test_it_says_what_it_is():
    task: Task = TASK
    assert (task.name, task.num_outputs, task.expected_shape(32)) == ("classification", 3, (3,))
    assert task.metric == Measure("accuracy", "max", (0.0, 1.0), 100, "%", 1)
    assert task.metric.text(0.934) == "93.4 %"


def test_the_soft_vote_is_the_mean():
    """Of sample 0: 1.7/3 and 1.3/3; of 1: 1.8/3, 1.2/3; of 2: .5, 1.6, .9; of 3: .5, 1.3, 1.2."""
    assert TASK.votes["soft"](PROBABILITIES).argmax(1).tolist() == [0, 0, 1, 1]
    mean = TASK.votes["soft"](PROBABILITIES)[2]
    torch.testing.assert_close(mean, torch.tensor([0.5, 1.6, 0.9]) / 3)


def test_the_hard_vote_counts_ballots_and_breaks_ties_by_the_mean():
    """Ballots: sample 0: 0,1,1; sample 1: 1,1,0; sample 2: 0,1,2, a tie; sample 3: 2,1,2."""
    vote = TASK.votes["hard"](PROBABILITIES)
    assert vote.argmax(1).tolist() == [1, 1, 1, 2]
    torch.testing.assert_close(vote.sum(1), torch.ones(4))
    assert torch.equal(TASK.votes["hard"](PROBABILITIES[..., None, None])[..., 0, 0], vote)


def test_a_strong_mean_never_overturns_a_majority():
    """Two models at 0.34 against one at 1.0."""
    probabilities = torch.tensor([[[0.34, 0.33, 0.33]], [[0.34, 0.33, 0.33]], [[0.0, 1.0, 0.0]]])
    assert TASK.votes["hard"](probabilities).argmax(1).tolist() == [0]
    assert TASK.votes["soft"](probabilities).argmax(1).tolist() == [1]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_smoothed_cross_entropy_of_each_sample(smoothing):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(N, CLASSES)), np.arange(N) % CLASSES
    wanted = (1 - smoothing) * np.eye(CLASSES)[targets] + smoothing / CLASSES
    by_hand = torch.as_tensor(-(wanted * log_softmax(logits)).sum(1))
    task = Classification(("a", "b", "c"), smoothing)
    outputs, targets = torch.as_tensor(logits), torch.as_tensor(targets)
    torch.testing.assert_close(task.loss(outputs, targets), by_hand, rtol=1e-12, atol=0)
    whole = task.loss(as_map(outputs), as_map(targets))
    torch.testing.assert_close(whole, (by_hand + by_hand.flip(0)) / 2, rtol=1e-12, atol=0)
    criterion = task.criterion(0.7, exploit=False)
    assert (criterion.explore, criterion.label_smoothing, criterion.exploit) == (
        0.7, smoothing, False,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distance_to_an_ensemble_is_the_divergence_from_the_mean_distribution(temperature):
    rng = np.random.default_rng(1)
    student, teachers = rng.normal(size=(N, CLASSES)), rng.normal(size=(4, N, CLASSES))
    p = np.exp(log_softmax(teachers / temperature, axis=2)).mean(axis=0)
    divergence = (p * (np.log(p) - log_softmax(student / temperature))).sum(1)
    by_hand = torch.as_tensor(temperature**2 * divergence)
    outputs = torch.as_tensor(student).requires_grad_()
    teachers = torch.as_tensor(teachers).requires_grad_()
    ensemble = TASK.ensemble(teachers, temperature)
    distance = TASK.distance(outputs, ensemble, temperature)
    torch.testing.assert_close(distance.detach(), by_hand, rtol=1e-11, atol=1e-13)
    distance.sum().backward()
    assert teachers.grad is None
    q = np.exp(log_softmax(student / temperature))
    torch.testing.assert_close(
        outputs.grad, torch.as_tensor(temperature * (q - p)), rtol=1e-10, atol=1e-13
    )
    maps = TASK.ensemble(torch.stack([as_map(t) for t in teachers.detach()]), temperature)
    torch.testing.assert_close(maps, as_map(ensemble.detach()))
    whole = TASK.distance(as_map(outputs.detach()), maps, temperature)
    torch.testing.assert_close(whole, (by_hand + by_hand.flip(0)) / 2, rtol=1e-11, atol=1e-13)


def test_an_ensemble_that_rules_a_class_out_stays_finite():
    """softmax(-200) is 0 in float32, and its logarithm would be no number to learn from."""
    ensemble = TASK.ensemble(torch.tensor([[[0.0, -200.0, 0.0]]]))
    assert torch.isfinite(ensemble).all()
    assert torch.isfinite(TASK.distance(torch.zeros(1, 3), ensemble)).all()


@pytest.mark.parametrize("form", [lambda x: x, as_map], ids=["classes", "maps"])
def test_meter_scores_and_results_are_those_of_the_whole_set(form):
    """In batches of 3 and 2. Sums in another order: some roundings of float32, 6e-8."""
    rng = np.random.default_rng(2)
    outputs = form(torch.as_tensor(rng.normal(size=(N, CLASSES)), dtype=torch.float32))
    targets = form(torch.as_tensor(rng.integers(0, CLASSES, N)))
    flat = outputs.movedim(1, -1).reshape(-1, CLASSES).double().numpy()
    classes = targets.flatten().numpy()
    accuracy = (flat.argmax(1) == classes).mean()
    loss = -log_softmax(flat)[np.arange(len(classes)), classes].mean()
    smoothed = Classification(("a", "b", "c"), 0.3)  # trained with, not measured by
    meter = smoothed.meter(torch.device("cpu"))
    meter.add(outputs[:3], targets[:3])
    meter.add(outputs[3:], targets[3:])
    result = meter.result()
    assert result == {"accuracy": accuracy, "loss": pytest.approx(loss, rel=1e-6), "n": N}
    predictions = smoothed.predict(outputs.bfloat16())
    assert predictions.dtype == torch.float32
    predictions = smoothed.predict(outputs)
    torch.testing.assert_close(predictions.sum(1), torch.ones_like(predictions[:, 0]))
    scores = smoothed.scores(predictions, targets)
    assert (scores.shape, scores.dtype) == ((N,), torch.float64)
    assert scores.mean().item() == accuracy
    expected = {"accuracy": accuracy, "loss": pytest.approx(loss, rel=1e-6)}
    assert smoothed.results(predictions, targets) == expected


def skewed(*counts):
    """Logits and targets of so many samples of each class; all are taken for class 0."""
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.eye(len(counts))[0].expand(len(targets), -1), targets


def metered(outputs, targets, batch=7):
    meter = TASK.meter(torch.device("cpu"))
    for part in range(0, len(outputs), batch):
        meter.add(outputs[part : part + batch], targets[part : part + batch])
    return meter.result()


@pytest.mark.parametrize(
    ("counts", "balanced"),
    [
        ((95, 5), 1 / 2),
        ((60, 20, 20), 1 / 3),  # three times as many
        ((59, 20, 20), None),
        ((8, 0, 1), 1 / 2),  # over the classes that are there
        ((6, 2), None),  # three times as many, but by chance
        ((7, 2), 1 / 2),
        ((9,), None),
        ((30, 30, 30), None),
    ],
)
def test_balanced_accuracy_stands_beside_accuracy_where_classes_are_skewed(counts, balanced):
    result = metered(*skewed(*counts))
    assert result["accuracy"] == counts[0] / sum(counts)
    assert result.get("balanced_accuracy") == balanced


def test_balanced_accuracy_is_the_mean_recall():
    """Of class 0 12 of 16 are right, of class 1 1 of 4; and targets to ignore count in neither."""
    targets = torch.tensor([0] * 16 + [1] * 4)
    guesses = torch.tensor([0] * 12 + [1] * 4 + [1] + [0] * 3)
    outputs = torch.nn.functional.one_hot(guesses, 3).float()
    assert metered(outputs, targets)["balanced_accuracy"] == (12 / 16 + 1 / 4) / 2
    maps = metered(as_map(outputs), as_map(targets))
    assert maps["balanced_accuracy"] == (12 / 16 + 1 / 4) / 2
    targets[0] = -100
    assert metered(outputs, targets)["balanced_accuracy"] == (11 / 15 + 1 / 4) / 2


def test_a_meter_without_a_sample_is_an_error():
    with pytest.raises(ValueError, match="batches: expected at least one sample"):
        TASK.meter(torch.device("cpu")).result()
    meter = TASK.meter(torch.device("cpu"))
    meter.add(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="batches: expected at least one sample"):
        meter.result()
    with pytest.raises(ValueError, match=r"predictions: empty batch, shape \[0, 3\]"):
        TASK.results(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("smoothing", [float("nan"), 1.5, -0.1, "0.1"])
def test_a_smoothing_out_of_range_is_refused(smoothing):
    message = rf"label_smoothing: expected a number in \[0, 1\], got {smoothing!r}"
    with pytest.raises(ValueError, match=message):
        Classification(("a", "b"), smoothing)


def test_data_of_other_classes_is_refused_and_says_which():
    TASK.check_same(Classification(("a", "b", "c"), 0.1), "there")
    message = r"there has other classes than the run: without \['c'\], with \['d', 'e'\]"
    with pytest.raises(ValueError, match=message):
        TASK.check_same(Classification(("a", "b", "d", "e")), "there")
    with pytest.raises(ValueError, match="there has other classes than the run: their order;"):
        TASK.check_same(Classification(("b", "a", "c")), "there")
