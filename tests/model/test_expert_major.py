"""Predictions expert by expert: what they say is what batch by batch says, and each expert comes in
once for all batches that are held together."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import SequentialExecutor
from hubpath_fast.executors.groups import groups_of
from hubpath_fast.model import add_newcomer
from hubpath_fast.model.expert_major import answers, by_expert
from hubpath_fast.runs import measure
from hubpath_fast.tasks import Classification
from hubpath_fast.training import evaluate

M, C, F = 5, 3, 6
SIZES = (7, 24, 1, 24, 5)
CPU = torch.device("cpu")


class WholeNumbers(nn.Module):
    """A linear expert whose products and sums are exact in float64, in groups of any size."""

    def __init__(self, shape=(C,)):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-9, 10, (C, F)).double())
        self.map = torch.randint(1, 5, shape[1:]).double()

    def forward(self, x):
        outputs = (8 * x.flatten(1)).round() @ self.weight.T
        return outputs if self.map.dim() == 0 else outputs[:, :, None, None] * self.map


class Scores(nn.Module):
    """A generator: a linear map of the sample, which leaves expert 3 out."""

    def __init__(self):
        super().__init__()
        self.clean = nn.Linear(F, M).double()
        nn.init.normal_(self.clean.weight, std=2.0)
        nn.init.constant_(self.clean.bias[3], -200.0)

    def forward(self, x):
        clean = self.clean(x.flatten(1))
        return clean, torch.zeros_like(clean)


class Counting(SequentialExecutor):
    """Has room for some experts, the least recently used goes first; counts who comes in."""

    def __init__(self, room):
        super().__init__(room)
        self.room, self.there, self.loads, self.rows = room, OrderedDict(), [], []

    def run(self, experts, source, min_group):
        for group in groups_of(source.routing):
            if group.index not in self.there:
                self.loads.append(group.index)
            self.there[group.index] = True
            self.there.move_to_end(group.index)
            if len(self.there) > self.room:
                self.there.popitem(last=False)
        self.rows.append(len(source.routing.rows))
        return super().run(experts, source, min_group)


def build(k=2, shape=(C,), aggregator=None, **options):
    torch.manual_seed(0)
    experts = [WholeNumbers(shape) for _ in range(M)]
    aggregator = hp.LinearAggregator(M, C) if aggregator is None else aggregator
    for parameter in aggregator.parameters():
        nn.init.normal_(parameter)
    return hp.HubPathway(experts, Scores(), aggregator.double(), k, C, **options).eval()


def batches(sizes=SIZES, shape=(F,)):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(n, *shape, generator=random, dtype=torch.float64) for n in sizes]


def assert_the_same(model, given, memory=2**30, tolerance=0.0):
    """Routes to the bit, predictions to ``tolerance`` of the largest. Of ``given`` batches."""
    with torch.no_grad():
        expected = list(answers(model, [(x, i) for i, x in enumerate(given)], CPU))
    found = list(by_expert(model, [(x, i) for i, x in enumerate(given)], memory=memory))
    assert [rest for _, _, rest in found] == list(range(len(given)))
    for (prediction, routing, _), (true, true_routing, _) in zip(found, expected, strict=True):
        for name in ("weights", "mean", "experts", "offsets", "rows", "positions"):
            assert torch.equal(getattr(routing, name), getattr(true_routing, name))
        assert (prediction.dtype, prediction.shape) == (true.dtype, true.shape)
        assert not prediction.requires_grad
        assert (prediction - true).abs().max() <= tolerance * true.abs().max()


@pytest.mark.parametrize("memory", [2**30, 900, 1])
@pytest.mark.parametrize("k", [1, 2, M])
def test_predictions_equal_batch_by_batch_to_the_bit(k, memory):
    assert_the_same(build(k), batches(), memory)


@pytest.mark.parametrize("executor", ["sequential", "threads"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    "aggregator",
    [hp.LinearAggregator, hp.SumAggregator, hp.MLPAggregator],
    ids=lambda a: a.__name__,
)
def test_aggregators_and_executors_say_the_same(aggregator, renormalize, executor):
    model = build(aggregator=aggregator(M, C), renormalize=renormalize, executor=executor)
    assert_the_same(model, batches())


def test_maps_say_the_same():
    assert_the_same(build(shape=(C, 4, 2)), batches(), memory=5000)


@pytest.mark.parametrize(
    ("policy", "fixed"),
    [
        (hp.RoutingPolicy(top_mass=0.7), False),
        (hp.RoutingPolicy(top_mass=0.7), True),
        (hp.RoutingPolicy(k=1), False),
        (hp.RoutingPolicy(k=1), True),
        (hp.RoutingPolicy(penalty=[0, 9, 0, 0, 0]), False),
    ],
)
def test_a_policy_is_followed(policy, fixed):
    model = build(k=3)
    if fixed:
        model.generator = hp.FixedRoutes([4, 0, 2], [0.6, 0.2, 0.2], M)
    model.policy = policy
    assert_the_same(model, batches())
    assert_the_same(model, batches(), memory=300)


def test_fixed_routes_may_be_more_than_k():
    model = build(k=1)
    model.generator = hp.FixedRoutes([4, 0, 2], [0.5, 0.25, 0.25], M)
    assert_the_same(model, batches())


def image_model(**options):
    """Of uint8 images, each expert with its own normalisation."""
    torch.manual_seed(0)
    experts = [
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, C),
        )
        for _ in range(M)
    ]  # fmt: skip
    means = torch.rand(M, 3)
    model = hp.HubPathway(
        experts, hp.PathwayGenerator(M, width=4), k=2, normalization=(means, means + 0.1), **options
    )
    with torch.no_grad():
        model.train()(torch.rand(64, 3, 8, 8))  # running statistics of their own
    nn.init.normal_(model.generator.clean.weight, std=3.0)
    return model.eval()


def images(sizes=SIZES):
    random = torch.Generator().manual_seed(2)
    return [torch.randint(256, (n, 3, 8, 8), generator=random).byte() for n in sizes]


# float32 sums of 27 and 32 products, in another order in a group of another size.
ROUNDED = 1e-6


def test_images_are_normalised_for_each_expert():
    assert_the_same(image_model(), images(), tolerance=ROUNDED)
    assert_the_same(image_model(), [x.float() / 255 for x in images()], tolerance=ROUNDED)


def test_frozen_models_say_the_same():
    model = image_model()
    model.freeze_for_inference(example=images()[0])
    assert_the_same(model, images(), tolerance=ROUNDED)
    half = image_model()
    half.freeze_for_inference(dtype=torch.bfloat16, example=images()[0])
    assert_the_same(half, images(), tolerance=2**-6)  # two roundings of bfloat16


def test_newcomers_say_the_same():
    model = image_model()
    add_newcomer(model, copy.deepcopy(model.experts[1]), mean=[0.5] * 3, std=[0.2] * 3)
    nn.init.normal_(model.generator.clean[-1].weight)
    score = [model.generator.generator(x / 255)[0].topk(2).values[:, 1].mean() for x in images()]
    nn.init.constant_(model.generator.clean[-1].bias, sum(score).item() / len(score))
    assert 0 < sum(model.route(x).counts()[M] for x in images()) < sum(SIZES)
    assert_the_same(model, images(), tolerance=ROUNDED)


@pytest.mark.parametrize("k", [1, 2])
def test_each_expert_comes_in_once(k):
    """Room for K experts: batch by batch brings them in again and again."""
    model, given = build(k), batches([16] * 12)
    model.executor = plain = Counting(k)
    for x in given:
        model(x)
    model.executor = counting = Counting(k)
    found = list(model.predict_expert_major(given))
    assert sorted(counting.loads) == [0, 1, 2, 4]  # 3 has no rows
    assert len(plain.loads) > 3 * len(counting.loads)
    assert len(found) == 12
    # One row to see what it is like, then all, and never more at once than a batch has.
    assert counting.rows[0] == 1
    assert sum(counting.rows) == 1 + 12 * 16 * k == 1 + sum(plain.rows)
    assert max(counting.rows) <= 16 * k


def test_the_expert_that_was_looked_at_is_asked_first_and_comes_in_once():
    """It may not be the first by number: the first batch has no rows for others."""
    model, [many] = build(k=1), batches([64])
    chosen = model.route(many).experts[:, 0] == 4
    model.executor = counting = Counting(1)
    list(model.predict_expert_major([many[chosen], many[~chosen]]))
    assert counting.loads[0] == 4
    assert sorted(counting.loads) == [0, 1, 2, 4]


def test_passes_turn_round_so_that_experts_which_are_there_come_first():
    model, given = build(k=1), batches([16] * 12)
    model.executor = counting = Counting(1)
    sample = 8 * F
    list(model.predict_expert_major(given, memory=4 * 16 * (sample + 8 * C)))
    assert len(counting.loads) == 4 + 3 + 3


def test_memory_bounds_what_is_read_before_it_is_answered():
    model, given = build(k=2), batches([16] * 12)
    read = []

    def reading():
        for x in given:
            read.append(x)
            yield x

    one = 16 * (8 * F + 2 * 8 * C)  # samples, and the outputs of two rows each
    found = model.predict_expert_major(reading(), memory=3 * one)
    for count in range(12):
        next(found)
        # Three are held, and one more was read to know that it is too many.
        assert len(read) == min(4 + 3 * (count // 3), 12)
    assert list(found) == []


def test_batches_larger_than_memory_are_answered_one_by_one():
    assert_the_same(build(), batches(), memory=1)


def test_no_batches_have_no_answers():
    assert list(build().predict_expert_major([])) == []


def test_measures_are_those_of_batch_by_batch():
    model, task = image_model(), Classification(("a", "b", "c"))
    pairs = [(x, torch.arange(len(x)) % C) for x in images()]
    expected, found = (
        measure.predict(model, task, pairs, "cpu", expert_major=way) for way in (False, True)
    )
    assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[0], expected[0], rtol=0, atol=ROUNDED)  # of probabilities
    model.train()
    expected, found = (evaluate(model, pairs, task, expert_major=way) for way in (False, True))
    assert model.training
    assert found.pop("routes") == expected.pop("routes")
    assert found == pytest.approx(expected, rel=ROUNDED)
    # Another network has no experts to go by.
    plain = [(x.float(), y) for x, y in pairs]
    assert evaluate(model.experts[0], plain, task, expert_major=True)["n"] == sum(SIZES)


def test_autocast_is_that_of_batch_by_batch():
    model = image_model()
    pairs = [(x, None) for x in images()]
    precisions = set()
    for expert in model.experts:
        expert.register_forward_hook(lambda _, inputs, output: precisions.add(output.dtype))
    with torch.no_grad():
        expected = list(answers(model, pairs, CPU, "bf16"))
        precisions.clear()
        found = list(answers(model, pairs, CPU, "bf16", expert_major=True))
    assert precisions == {torch.bfloat16}
    for (prediction, routing, _), (true, true_routing, _) in zip(found, expected, strict=True):
        assert torch.equal(routing.experts, true_routing.experts)
        assert prediction.dtype == true.dtype
        assert (prediction - true).abs().max() <= 2**-6 * true.abs().max()


def test_what_it_cannot_do_is_said():
    model = build()
    with pytest.raises(ValueError, match=r"evaluation mode; call model\.eval"):
        next(build().train().predict_expert_major(batches()))
    with pytest.raises(ValueError, match="memory: expected a number of bytes of at least 1, got 0"):
        next(model.predict_expert_major(batches(), memory=0))
    model.experts[4] = WholeNumbers((C, 2, 2))
    for k in (1, 2):  # by itself, and among others
        model.k = k
        with pytest.raises(ValueError, match=r"of shape \[3, 2, 2\] per row, but .* gives \[3\]"):
            list(model.predict_expert_major(batches()))
