"""Hubs for the digits: which expert descends from which."""

import torch
from rich.console import Console

from hubpath_fast.compare.digits_hub import Pretraining, pretrained_experts
from hubpath_fast.data import DigitsTask

# A rate of almost nothing: what an expert starts from is what it ends with.
STILL = Pretraining(epochs=1, batch_size=350, lr=1e-30)


def kernels(experts):
    return [next(expert.body.parameters()) for expert in experts]


def test_a_hub_of_equal_networks_descends_from_its_first(tmp_path):
    task, console = DigitsTask(0, 100), Console(quiet=True)
    networks = ("timm/test_resnet",) * 3
    make, _ = pretrained_experts(task, STILL, 10, console, tmp_path, networks)
    first, *others = kernels(make())
    assert all(torch.equal(first, other) for other in others)
    folders = sorted(path.name.partition("-")[0] for path in (tmp_path / "digits").iterdir())
    assert folders == ["inverted", "turned", "upright"]

    alone, _ = pretrained_experts(task, STILL, 10, console, tmp_path, networks[:1])
    assert torch.equal(kernels(alone())[0], first)  # the ancestor is the same, and in the cache
    assert len(list((tmp_path / "digits").iterdir())) == 3


def test_a_mixed_hub_does_not(tmp_path):
    task, console = DigitsTask(0, 100), Console(quiet=True)
    networks = ("test_resnet", "test_efficientnet", "test_resnet")
    make, _ = pretrained_experts(task, STILL, 10, console, tmp_path, networks)
    experts = make()
    first, last = kernels([experts[0], experts[2]])
    assert not torch.equal(first, last)
