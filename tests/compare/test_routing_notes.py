"""What a comparison says of its Hub-Pathway's routes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from support.training import FEATURES as F
from support.training import Generator
from torch import nn

from hubpath_fast.compare import routing
from hubpath_fast.compare.routing import judge_routing
from hubpath_fast.model import FixedRoutes, HubPathway
from hubpath_fast.tasks import Classification
from hubpath_fast.training import TrainerConfig

M, C = 3, 3


def split(seed, n=40):
    x = torch.randn(n, F, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :C].argmax(1)


def test_the_fixed_set_of_validation_is_scored_on_test_images_for_information():
    torch.manual_seed(0)
    model = HubPathway([nn.Linear(F, C) for _ in range(M)], Generator(M), k=2)
    parts = {"validation": split(1), "test": split(2)}
    problem = SimpleNamespace(
        task=Classification(("x", "y", "z")),
        fit=SimpleNamespace(trainer=TrainerConfig()),
        expert_names=("A", "B", "C"),
        batches=lambda name: [parts[name]],
        targets={name: y for name, (_, y) in parts.items()},
    )
    generator = model.generator
    found = judge_routing(model, problem)
    assert model.generator is generator
    x, y = parts["test"]
    model.eval()
    with torch.no_grad():
        learned = (model(x).argmax(1) == y).double().mean().item()
        fixed = found["routing"]["fixed"]
        model.generator = FixedRoutes(fixed["experts"], fixed["weights"], M)
        always = (model(x).argmax(1) == y).double().mean().item()
    assert found["routing"]["test"] == {"learned": learned, "fixed": always}
    assert found["routing"]["split"] == "validation"
    assert sum(found["routes"]["share"]) == pytest.approx(2)
    assert json.loads(json.dumps(found)) == found


def held(learned, fixed, top):
    return {
        "sentence": f"routing is {learned}", "fixed": {}, "added": {"fixed": {"value": 0.01}},
        "test": {"learned": learned, "fixed": fixed},
        "quality": {"counted": 9, "top": top, "random": 0.5},
    }  # fmt: skip


def notes(monkeypatch, tmp_path, results, rows=({"method": "hub-pathway", "seeds": [0]},)):
    class Results:
        split = "test"

        def __init__(self, out, seed, rates):
            self.seed = seed

        def result(self, run):
            assert run == "pathway"
            if self.seed not in results:
                raise routing.RunFailed("it failed")
            return results[self.seed]

    monkeypatch.setattr(routing, "SeedResults", Results)
    fit = SimpleNamespace(task="classification")
    settings = SimpleNamespace(fit=fit, rates=(0.1,))
    return routing.routing_notes(settings, rows, (0, 1, 2), tmp_path)


def test_the_notes_are_of_each_seed_and_of_all(monkeypatch, tmp_path):
    results = {0: {"routing": held(0.9, 0.8, 0.7)}, 2: {"routing": held(0.7, 0.7, 0.6)}}
    assert notes(monkeypatch, tmp_path, results) == [
        "Seed 0: routing is 0.9.",
        "Seed 2: routing is 0.7.",
        "Over the best fixed experts of each seed, routing is 1.0 ± 0.0 points better (mean and "
        "standard deviation of seeds 0, 2).",
        "On the test images the learned routes have accuracy 80.0 %, the fixed experts that "
        "validation chose 75.0 % (means over the seeds).",
        "On validation images on which some expert does not fail, the most trusted one has "
        "accuracy 65.0 %, a random one 50.0 % (means over the seeds).",
    ]
    assert len(notes(monkeypatch, tmp_path, {2: results[2]})) == 3


def test_there_are_none_of_earlier_versions_and_of_other_methods(monkeypatch, tmp_path):
    assert notes(monkeypatch, tmp_path, {0: {"test": {"accuracy": 0.5}}}) == []
    rows = [{"method": "ensemble", "seeds": [0]}, {"method": "hub-pathway", "seeds": []}]
    assert notes(monkeypatch, tmp_path, {0: {"routing": held(1, 1, 1)}}, rows) == []
