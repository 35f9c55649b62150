"""A process that has some experts of a hub builds those as one that has all does, and the others
without memory."""

import dataclasses

import pytest
import torch
from support.meta import on_meta
from torch import nn

from hubpath_fast.devices import to_meta
from hubpath_fast.hub import build_experts, create_model
from hubpath_fast.model.saving import model_config
from hubpath_fast.runs.build import build_seeded
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.tasks.classification import Classification
from hubpath_fast.tasks.landmarks import attach_heatmap_head

NAMES = ["test_resnet?size=48", "test_convnext?bn=running", "test_resnet?lr=0.5", "test_byobnet"]


@dataclasses.dataclass(frozen=True)
class Maps:
    """A head of layers that are drawn once the weights are loaded."""

    num_outputs: int = 5

    def expected_shape(self, size):
        return (self.num_outputs, size // 4, size // 4)

    def attach_head(self, network):
        return attach_heatmap_head(network, self.num_outputs, 8)


def assert_own(models, whole, own):
    """models: modules of experts, of a process that has ``own``."""
    for i, (mine, its) in enumerate(zip(models, whole, strict=True)):
        assert on_meta(mine) == (i not in own)
        states = mine.state_dict(), its.state_dict()
        assert list(states[0]) == list(states[1])
        for name, tensor in states[0].items():
            other = states[1][name]
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (
                other.shape,
                other.stride(),
                other.dtype,
            )
            assert tensor.is_meta == (i not in own)
            assert tensor.is_meta or torch.equal(tensor, other), (i, name)


@pytest.mark.parametrize("own", [(), (1,), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("task", [None, Maps()])
def test_own_experts_and_what_is_drawn_next_are_those_of_one_process(own, task):
    found = []
    for mine in (None, own):
        torch.manual_seed(7)
        experts = build_experts(NAMES, 5, False, 64, task=task, own=mine)
        found.append(([expert.module for expert in experts], torch.rand(3)))
    (whole, drawn), (models, drawn_next) = found
    assert_own(models, whole, own)
    assert torch.equal(drawn, drawn_next)


def test_a_seeded_model_is_described_as_in_one_process():
    config = FitConfig(
        dataset="digits",
        hub=("test_resnet", "test_byobnet", "test_resnet?freeze=body"),
        pretrained=False,
        head_init=0.1,
        channels_last=True,
    )
    task = Classification(tuple("abcde"))
    whole = build_seeded(config, task, 64)
    for own in ({1}, {0, 2}):
        model = build_seeded(config, task, 64, own)
        assert_own(model.experts, whole.experts, own)
        for part in ("generator", "aggregator"):
            mine, its = (getattr(m, part).state_dict() for m in (model, whole))
            assert all(torch.equal(mine[name], its[name]) for name in its)
        assert model_config(model) == model_config(whole)


def test_weights_of_other_processes_experts_are_not_read(cached_test_resnet):
    """Those of test_byobnet are nowhere, a file is missing, and there is no network."""
    model = create_model(
        ["test_byobnet", "test_resnet", "file/nowhere.pt?arch=test_byobnet"],
        5,
        input_size=160,
        own=[1],
        generator_width=4,
    )
    assert [on_meta(expert) for expert in model.experts] == [True, False, True]
    own = model.experts[1].state_dict()
    for name, tensor in cached_test_resnet.items():
        if not name.startswith("fc."):
            assert torch.equal(own[name], tensor), name


def test_modules_of_ones_own_stay_where_they_are():
    module = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    module(torch.rand(1, 3, 32, 32))
    experts = build_experts([module, "test_resnet"], 5, False, 32, own=[])
    assert [on_meta(expert.module) for expert in experts] == [False, True]


def test_what_is_one_tensor_or_one_memory_stays_one_on_meta():
    one, two, three = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    three.weight.data = one.weight.data.t()
    three.bias.requires_grad_(False)
    one.register_buffer("part", one.weight.data[1:])
    models = [nn.Sequential(one), nn.Sequential(two, three)]
    to_meta(models)
    assert all(t.is_meta for m in models for t in m.state_dict().values())
    assert two.weight is one.weight
    assert three.weight is not one.weight
    assert three.weight.untyped_storage()._cdata == one.weight.untyped_storage()._cdata
    assert three.weight.stride() == (1, 3)
    assert one.part.storage_offset() == 3
    assert one.bias.untyped_storage()._cdata != two.bias.untyped_storage()._cdata
    assert isinstance(three.bias, nn.Parameter)
    assert [p.requires_grad for p in three.parameters()] == [True, False]
