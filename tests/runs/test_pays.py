"""Does routing pay? The finding against plain computations, and its sentences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support.training import FEATURES as F
from support.training import Generator
from torch import nn

from hubpath_fast.measure import Measure
from hubpath_fast.model import HubPathway, MLPAggregator
from hubpath_fast.runs import pays
from hubpath_fast.runs.pays import (
    Asked,
    best_set,
    bootstrap,
    compared,
    does_routing_pay,
    fixed_routes,
    fixed_weights,
    prefers_fixed,
)
from hubpath_fast.runs.pays_words import quality_sentence, routes_sentence, routing_of_seeds
from hubpath_fast.tasks import Classification
from hubpath_fast.tasks.classification import ACCURACY

M, C = 4, 3
NAMES = ["A", "B", "C", "D"]
TASK = Classification(("x", "y", "z"))
ERROR = Measure("error", "min", (0.0, None))


def model(k=2, seed=0, mlp=False):
    torch.manual_seed(seed)
    experts = [nn.Sequential(nn.Linear(F, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5),
                             nn.Linear(8, C)) for _ in range(M)]  # fmt: skip
    for expert in experts:
        nn.init.normal_(expert[-1].weight)  # predictions that hang on the image
    made = HubPathway(
        experts, Generator(M), MLPAggregator(M, C) if mlp else None, k=k, num_outputs=C
    )
    if not mlp:
        nn.init.normal_(made.aggregator.bias, std=0.1)
    return made


def data(n=50, seed=1, size=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, F, generator=generator)
    y = x[:, :C].argmax(1)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


def whole(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def by_hand(made, x, y, weights):
    """[n] right or wrong with dense weights [n, M]: each expert, then the aggregator."""
    with torch.no_grad():
        outputs = torch.stack([expert(x) for expert in made.experts], 1)
        concat = torch.where(weights[..., None] > 0, outputs * weights[..., None], 0.0).flatten(1)
        return (made.aggregator(concat).argmax(1) == y).double().numpy()


@pytest.mark.parametrize("mlp", [False, True])
def test_every_part_of_the_finding_against_a_plain_computation(mlp):
    made, batches = model(mlp=mlp).eval(), data()
    x, y = whole(batches)
    found = does_routing_pay(made.train(), TASK, batches, NAMES, seed=3)
    assert made.training
    made.eval()
    with torch.no_grad():
        routing, predicted = made.route(x), made(x)
        p = torch.softmax(made.generator(x)[0], 1)
    assert found["learned"]["value"] == (predicted.argmax(1) == y).double().mean().item()
    total = routing.weights.sum(1).mean().item()
    values = {}
    for pair in itertools.combinations(range(M), 2):  # brute force
        weights = torch.zeros(M)
        weights[list(pair)] = p.mean(0)[list(pair)]
        weights = total * weights / weights.sum()
        values[pair] = by_hand(made, x, y, weights.expand(len(x), M)).mean()
        if list(pair) == found["fixed"]["experts"]:
            kept = weights[list(pair)].tolist()
    assert found["fixed"]["value"] == max(values.values())
    first = next(pair for pair, value in values.items() if value == max(values.values()))
    assert found["fixed"]["experts"] == list(first)
    assert found["fixed"]["names"] == [NAMES[i] for i in first]
    assert found["fixed"]["weights"] == pytest.approx(kept, rel=1e-6)
    assert found["fixed"]["sets"] == len(values) == 6
    for i, own in enumerate(found["alone"]):
        weights = torch.zeros(M)
        weights[i] = total
        assert own["value"] == by_hand(made, x, y, weights.expand(len(x), M)).mean()
        assert own["name"] == NAMES[i]
    draws = pays.random_weights(len(x), M, 2, total, seed=3)
    assert all(((w > 0).sum(1) == 2).all() for w in draws)
    assert torch.stack(draws).sum(2).numpy() == pytest.approx(total)
    expected = np.mean([by_hand(made, x, y, w) for w in draws])
    assert found["random"]["value"] == pytest.approx(expected, abs=1e-12)
    added = found["added"]
    assert added["fixed"]["value"] == pytest.approx(
        found["learned"]["value"] - found["fixed"]["value"], abs=1e-12
    )
    assert found["images"] == 50
    assert found["quality"]["samples"] == 50


def test_it_repeats_and_draws_nothing_of_the_runs_random_state():
    made, batches = model(), data()
    state = torch.random.get_rng_state()
    one = does_routing_pay(made, TASK, batches, NAMES, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert does_routing_pay(made, TASK, batches, NAMES, seed=0) == one
    other = does_routing_pay(made, TASK, batches, NAMES, seed=1)
    assert other["learned"]["value"] == one["learned"]["value"]
    assert other["random"] != one["random"]


def test_quality_is_of_the_experts_own_outputs():
    made, batches = model().eval(), data()
    x, y = whole(batches)
    with torch.no_grad():
        right = torch.stack([expert(x).argmax(1) == y for expert in made.experts], 1)
        top = made.route(x).experts[:, 0]
    counted = right.any(1)
    found = does_routing_pay(made, TASK, batches, NAMES, seed=0)["quality"]
    assert found["counted"] == int(counted.sum())
    own = right.gather(1, top[:, None])[counted].double().mean().item()
    assert found["top"] == pytest.approx(own)
    assert found["random"] == pytest.approx(right[counted].double().mean().item())


def test_of_outputs_beyond_the_memory_experts_are_asked_again_and_say_the_same():
    made, batches = model(), data()
    asked = []
    made.experts[0].register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
    kept = Asked(made, TASK, batches, "cpu", "none")
    candidates = [kept.weights, fixed_weights(kept.mean, [0, 2], 0.7)]
    expected = kept.scores(candidates)
    assert sum(asked) == 50
    again = Asked(made, TASK, batches, "cpu", "none", in_memory=1000)  # the first batch has 576
    assert again.parts is None
    assert np.array_equal(again.scores(candidates), expected)
    assert np.array_equal(again.alone, kept.alone)
    assert sum(asked) == 150


def test_the_fixed_set_of_a_large_hub_grows_one_by_one():
    asked = Asked(model(), TASK, data(), "cpu", "none")
    experts, tried, scores = best_set(asked, ACCURACY, 3, 0.7, most=3)
    expected = []
    for _ in range(3):
        sets = [sorted([*expected, i]) for i in range(M) if i not in expected]
        means = [asked.scores([fixed_weights(asked.mean, s, 0.7)]).mean() for s in sets]
        expected = sets[int(np.argmax(means))]
    assert (experts, tried) == (expected, 4 + 3 + 2)
    assert scores.mean() == max(means)


def test_the_bootstrap_has_the_known_variance_and_pairs():
    scores = np.random.default_rng(0).normal(size=(2, 400))
    scores = np.stack([*scores, scores[0] - scores[1], scores[0] + 3])
    means = bootstrap(scores, seed=0, resamples=4000)
    assert means.shape == (4, 4000)
    expected = scores.std(axis=1) / 20  # of a mean of 400; the estimate is within 1.1 % (1 sigma)
    assert means.std(axis=1) == pytest.approx(expected, rel=0.05)
    assert means.mean(axis=1) == pytest.approx(scores.mean(axis=1), abs=4 * 0.08 / 4000**0.5)
    assert means[2] == pytest.approx(means[0] - means[1], abs=1e-12)
    assert means[3] == pytest.approx(means[0] + 3, abs=1e-12)
    # In parts, where all counts of images at once would be too much; each its own draw.
    many = bootstrap(np.arange(3_000_000.0)[None], seed=0, resamples=3)
    assert len(set(many[0].tolist())) == 3


def test_intervals_cover_what_they_should():
    generator, covered = np.random.default_rng(1), 0
    for seed in range(200):
        a, b = generator.random((2, 100)) < np.array([[0.7], [0.6]])
        rivals = {"learned": a.astype(float), "fixed": b.astype(float)}
        added = compared(rivals, ACCURACY, seed)["added"]["fixed"]
        covered += added["low"] <= 0.1 <= added["high"]
    assert 180 <= covered <= 199  # 95 % of 200, by 3 sigma (3.1) on either side


def example(gain, n=400, better="max", scale=0.1):
    """A finding of hand-made scores."""
    generator = np.random.default_rng(0)
    base = generator.random(n)
    measure = ACCURACY if better == "max" else ERROR
    learned = base + measure.sign * (gain + scale * generator.normal(size=n))
    rivals = {"learned": learned, "fixed": base, "random": base - measure.sign}
    found = compared(rivals, measure, 0)
    return measure, {
        **found["values"], "added": found["added"], "split": "validation", "images": n,
        "fixed": {**found["values"]["fixed"], "names": ["A", "C"]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "better", "text"),
    [
        (0.019, "max", "routing adds 1.9 ± 0.5 points over always asking A and C (accuracy "),
        (-0.03, "max", "routing does not pay here: ask A and C (always asking them is 3.0 ± 0.5 "
         "points better: accuracy "),
        (0.001, "max", "routing is not shown to pay here: +0.1 ± 0.5 points over always asking A "
         "and C (accuracy "),
        (-0.001, "max", "routing does not pay here: ask A and C (always asking them is 0.1 ± 0.5 "
         "points better: accuracy "),
        (0.0, "max", "routing does not pay here: ask A and C (always asking them is as good: "
         "accuracy "),
        (0.019, "min", "routing lowers error by 0.019 ± 0.005 over always asking A and C (error "),
        (0.001, "min", "routing is not shown to pay here: -0.001 ± 0.005 over always asking A and "
         "C (error "),
    ],
)  # fmt: skip
def test_the_sentence(gain, better, text):
    measure, found = example(gain, better=better)
    shift = found["added"]["fixed"]["value"] - gain  # of the draw
    assert abs(shift) < 0.015
    for key in ("value", "low", "high"):
        found["added"]["fixed"][key] -= shift
    said = pays.sentence(found, measure, NAMES)
    assert said.startswith(text), said
    assert said.endswith(", 400 validation images)")


def test_equal_routes_are_said_to_be_as_good():
    measure, found = example(0.0, scale=0.0)
    said = pays.sentence(found, measure, NAMES)
    assert said.startswith("routing does not pay here: ask A and C (always asking them is as good:")


def test_a_router_that_sorts_pays_and_one_that_does_not_does_not():
    """Two experts, each right on one half, and two that are never right."""
    n = 200
    x = torch.randn(n, F, generator=torch.Generator().manual_seed(0))
    y = (torch.arange(n) % C).long()
    x[:, 1:] = nn.functional.one_hot(y, F - 1).float()

    class Half(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign, self.weight = sign, nn.Parameter(torch.zeros(1))

        def forward(self, x):
            right = x[:, 1 : 1 + C]
            wrong = right.roll(1, dims=1)
            return torch.where((x[:, :1] > 0) == (self.sign > 0), right, wrong) + self.weight

    class Sorts(nn.Module):
        def forward(self, x):
            up = (x[:, :1] > 0).float()
            clean = torch.cat([up, 1 - up, -torch.ones(len(x), 2)], 1)
            return 5 * clean, torch.zeros_like(clean)

    experts = [Half(1), Half(-1), Half(1), Half(-1)]
    made = HubPathway(experts, Sorts(), k=1, num_outputs=C)
    found = does_routing_pay(made, TASK, [(x, y)], NAMES, 0)
    assert (found["pays"], found["learned"]["value"]) == (True, 1.0)
    assert found["added"]["fixed"]["low"] > 0.3
    assert found["sentence"].startswith("routing adds ")
    assert not prefers_fixed(found, ACCURACY)

    class Settled(Sorts):
        def forward(self, x):
            clean = torch.tensor([5.0, 0, 0, 0]).expand(len(x), M)
            return clean, torch.zeros_like(clean)

    made.generator = Settled()
    found = does_routing_pay(made, TASK, [(x, y)], NAMES, 0)
    assert found["pays"] is False
    assert found["added"]["fixed"]["value"] <= 0
    assert prefers_fixed(found, ACCURACY)  # of equals the one that needs no router


def test_the_fixed_routes_are_the_set_that_was_judged():
    made, batches = model().eval(), data()
    x, y = whole(batches)
    found = does_routing_pay(made, TASK, batches, NAMES, seed=0)
    made.generator = fixed_routes(found)
    with torch.no_grad():
        right = (made(x).argmax(1) == y).double().mean().item()
    assert right == found["fixed"]["value"]
    assert made.route(x).weights.sum(1).numpy() == pytest.approx(sum(found["fixed"]["weights"]))


def test_all_experts_or_one_leave_nothing_to_choose():
    found = does_routing_pay(model(k=M), TASK, data(), NAMES, seed=0)
    assert found["pays"] is None
    assert found["sentence"] == (
        "routing has nothing to choose: all 4 of 4 experts are asked about every image"
    )
    assert "fixed" not in found
    assert "random" not in found
    assert len(found["alone"]) == M
    assert not prefers_fixed(found, ACCURACY)
    made = HubPathway([nn.Linear(F, C)], One(), k=1)
    found = does_routing_pay(made, TASK, data(), ["A"], seed=0)
    assert found["sentence"] == "routing has nothing to choose: the hub has one expert"


class One(nn.Module):
    def forward(self, x):
        return x.new_zeros(len(x), 1), x.new_zeros(len(x), 1)


def test_other_sentences():
    quality = {"samples": 60, "counted": 46, "top": 0.82608, "random": 0.41739}
    assert quality_sentence({"split": "validation", "quality": quality}, ACCURACY) == (
        "on 46 of 60 validation images some expert does not fail; there the most trusted one has "
        "accuracy 82.6 %, a random one 41.7 %"
    )
    assert quality_sentence({}, ACCURACY) is None
    routes = {"share": [1.0, 0.62, 0.38], "sets": 2, "mutual_information": 0.1234}
    assert routes_sentence(routes, ["A", "B", "C"]) == (
        "asked without noise: A 100%, B 62%, C 38% of the images; 2 different sets of 2, mutual "
        "information with the class 0.12 nats"
    )
    results = [
        {"routing": {"sentence": f"s{i}", "kept": kept, "fixed": {},
                     "added": {"fixed": {"value": value}}}}
        for i, (kept, value) in enumerate((("fixed", -0.02), ("learned", 0.01)))
    ]  # fmt: skip
    assert routing_of_seeds((4, 7), results, ACCURACY) == [
        "seed 4: s0; kept: these experts for every image",
        "seed 7: s1; kept: the learned routes",
        "over the best fixed experts of each seed, routing is -0.5 ± 2.1 points better (mean and "
        "standard deviation of seeds 4, 7)",
    ]
    assert routing_of_seeds((0,), [{"test_accuracy": 0.5}], ACCURACY) == []


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Asked(model(), TASK, [], "cpu", "none")


def test_maps_are_judged_by_their_positions():
    """Experts that give maps [n, C, h, w]."""
    torch.manual_seed(0)
    experts = [nn.Conv2d(2, C, 1) for _ in range(M)]

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.Linear(2, 2 * M)

        def forward(self, x):
            return self.heads(x.mean((2, 3))).chunk(2, dim=1)

    made = HubPathway(experts, Pooled(), k=2, num_outputs=C).eval()
    x, y = torch.randn(10, 2, 5, 4), torch.randint(C, (10, 5, 4))
    found = does_routing_pay(made, TASK, [(x[:6], y[:6]), (x[6:], y[6:])], NAMES, seed=0)
    with torch.no_grad():
        expected = (made(x).argmax(1) == y).double().mean().item()
    assert found["learned"]["value"] == pytest.approx(expected, abs=1e-12)
    assert found["images"] == 10
