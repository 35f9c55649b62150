"""Calibration: what is computed of stored features is what the model then says."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.model import add_newcomer
from hubpath_fast.runs.calibrate import (
    Calibrated,
    Seen,
    apply,
    best_of,
    by_group,
    calibrate,
    joined,
    see,
)
from hubpath_fast.tasks import Classification

C, N = 4, 120
IMAGES = torch.tensor([0.5] * 3), torch.tensor([0.5] * 3)
TASK = Classification(tuple("abcd"))


class Expert(nn.Module):
    """Sees the mean of one channel; its head is new."""

    def __init__(self, channel):
        super().__init__()
        self.channel, self.head = channel, nn.Linear(3, C)

    def forward(self, x):
        mean = x[:, self.channel].mean(dim=(1, 2))
        return self.head(torch.stack([mean, mean**2, mean**3], dim=1))


def make_data():
    """Half of the images are dark in red: of those, blue has the class; else green has."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(C, (N,), generator=draw)
    images = torch.rand(N, 3, 8, 8, generator=draw)
    strange = torch.arange(N) % 2 == 0
    images[strange, 0] *= 0.1
    level = (targets + 0.5)[:, None, None] / C
    images[~strange, 1] = level[~strange].expand(-1, 8, 8)
    images[strange, 2] = level[strange].expand(-1, 8, 8)
    return images, targets, strange


@pytest.fixture(scope="module")
def hub():
    """Two experts that know green images well, as they were trained on them alone."""
    torch.manual_seed(0)
    images, targets, strange = make_data()
    model = hp.HubPathway(
        [Expert(1), Expert(1)],
        hp.PathwayGenerator(2, width=4),
        hp.LinearAggregator(2, C),
        k=2,
        normalization=(torch.full((2, 3), 0.5), torch.full((2, 3), 0.5)),
    )
    optimizer = torch.optim.Adam(model.experts.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model.train()(images[~strange]).prediction, targets[~strange]
        ).backward()
        optimizer.step()
    return model.eval()


def seen_of(model, newcomer, chosen):
    images, targets, _ = make_data()
    batches = [(images[chosen], targets[chosen])]
    return see(model, newcomer, IMAGES, batches, torch.device("cpu"))


def in_hub(model, newcomer):
    model = copy.deepcopy(model)
    add_newcomer(model, newcomer, *IMAGES)
    return model


FIT, CHOOSE = torch.arange(N) % 3 != 0, torch.arange(N) % 3 == 0


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("renormalize", [False, True])
def test_an_image_sent_to_the_newcomer_gets_what_the_model_then_says(hub, k, renormalize):
    model = copy.deepcopy(hub)
    model.k, model.renormalize = k, renormalize
    torch.manual_seed(2)
    nn.init.normal_(model.generator.clean.weight)  # each expert is the best of some images
    newcomer = Expert(2)
    seen, _ = seen_of(model, newcomer, FIT)
    assert len(seen.answers.clean.argmax(dim=1).unique()) == 2
    grown = in_hub(model, newcomer)
    score = grown.generator.clean[-1]
    with torch.no_grad():
        score.bias.fill_(seen.answers.clean.max() + 0.5)  # above all others, which still count
    x = make_data()[0][FIT]
    own = newcomer((x - 0.5) / 0.5)
    # A handful of float32 operations on values below 1e2.
    for stored in (seen, seen.condensed()):
        found = joined(stored, score(seen.features), own)
        torch.testing.assert_close(found, grown(x), rtol=1e-5, atol=1e-5)
    part = torch.tensor([3, 0])
    found = joined(seen.condensed().subset(part), score(seen.features[part]), own[part])
    torch.testing.assert_close(found, grown(x)[part], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.before, model(x), rtol=1e-5, atol=1e-5)


def test_it_finds_which_images_the_newcomer_is_for(hub):
    torch.manual_seed(1)
    newcomer = Expert(2)
    before = copy.deepcopy(newcomer.state_dict())
    fit, _ = seen_of(hub, newcomer, FIT)
    choose, head = seen_of(hub, newcomer, CHOOSE)
    found = calibrate(fit, choose, head.layer, TASK, steps=200)
    assert all(torch.equal(before[name], v) for name, v in newcomer.state_dict().items())
    grown = in_hub(hub, newcomer)
    apply(grown, head.layer, found)
    images, targets, strange = make_data()
    x, y, strange = images[CHOOSE], targets[CHOOSE], strange[CHOOSE]
    sent = (grown.route(x).experts == 2).any(dim=1)
    loss = nn.functional.cross_entropy(grown(x), y).item()
    # What calibration promised of the images to choose on is what the hub then does.
    assert found.after == pytest.approx(loss, rel=1e-4)
    assert found.share == pytest.approx(sent.float().mean().item())
    assert found.after < 0.8 * found.before
    right_before = (hub(x).argmax(1) == y)[strange].float().mean()
    right = (grown(x).argmax(1) == y)[strange].float().mean()
    assert right > right_before + 0.2
    assert sent[strange].float().mean() > sent[~strange].float().mean() + 0.3
    assert torch.equal(grown.route(x).weights[~sent], hub.route(x).weights[~sent])


def test_nothing_but_the_newcomer_changes(hub):
    newcomer = Expert(2)
    fit, head = seen_of(hub, newcomer, FIT)
    before = copy.deepcopy(hub.state_dict())
    found = calibrate(fit, fit, head.layer, TASK, steps=5)
    grown = in_hub(hub, newcomer)
    apply(grown, head.layer, found)
    after = grown.state_dict()
    moved = {"generator.": "generator.generator.", "aggregator.": "aggregator.aggregator."}
    for name, value in before.items():
        for old, new in moved.items():
            name = name.replace(old, new) if name.startswith(old) else name
        same = after[name][:2] if name.startswith("input_") else after[name]
        assert torch.equal(same, value), name


def test_the_same_seed_finds_the_same(hub):
    newcomer = Expert(2)
    fit, head = seen_of(hub, newcomer, FIT)
    one, two = (calibrate(fit, fit, head.layer, TASK, steps=7, seed=3) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert one.after == two.after


def test_a_head_that_is_fitted_already_stays(hub):
    newcomer = Expert(2)
    fit, head = seen_of(hub, newcomer, FIT)
    found = calibrate(fit, fit, head.layer, TASK, steps=100, fit_head=False)
    assert all(torch.equal(found.head[name], v) for name, v in head.layer.state_dict().items())
    assert found.after < found.before


def test_a_network_without_a_head_is_refused(hub):
    class Headless(nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    with pytest.raises(ValueError, match="has no head"):
        seen_of(hub, Headless(), FIT)


def test_groups_count_alike_however_large():
    group = torch.tensor([0, 0, 0, 5])
    seen = Seen(None, None, None, None, group)
    assert by_group(torch.tensor([1.0, 2.0, 6.0, 5.0]), seen).tolist() == [3.0, 5.0]


def test_of_what_is_almost_the_best_the_fewest_images_are_sent():
    def one(after, share):
        return Calibrated(torch.zeros(1), torch.zeros(1), {}, 2.0, after, share)

    # 1.0 is gained at most; 0.02 of it may be given up.
    found = [one(1.0, 0.9), one(1.015, 0.5), one(1.03, 0.1)]
    assert best_of(found) is found[1]
    assert best_of([]) is None


def test_a_newcomer_that_makes_a_group_worse_is_not_kept(hub):
    newcomer = Expert(2)
    fit, head = seen_of(hub, newcomer, FIT)
    strange = make_data()[2][FIT]
    apart = dataclasses.replace(fit, group=(~strange).long())
    fit.answers.targets[~strange] = hub(make_data()[0][FIT])[~strange].argmax(dim=1)
    found = calibrate(apart, apart, head.layer, TASK, steps=100)
    grown = in_hub(hub, newcomer)
    apply(grown, head.layer, found)
    x, y = make_data()[0][FIT], fit.answers.targets
    with torch.no_grad():
        old, new = (nn.functional.cross_entropy(m(x[~strange]), y[~strange]) for m in (hub, grown))
    assert new <= old + 1e-5  # a rounding of float32
    assert found.after < found.before
