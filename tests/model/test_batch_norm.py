"""BatchNorm without running statistics is refused in every part of a hub, before anything runs."""

from __future__ import annotations

import re

import pytest
import torch
from support.pathway import TableGenerator
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import hubpath_fast as hp
from hubpath_fast import reference
from hubpath_fast.hub import HubError, build_experts


def expert(norm=None):
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(norm or nn.Identity()), nn.Flatten(), nn.Linear(256, 3)
    )


def hub(*norms, **parts):
    experts = [expert(norm) for norm in norms]
    generator = parts.pop("generator", None) or TableGenerator(torch.zeros(9, 2), torch.zeros(9, 2))
    return hp.HubPathway(experts, generator, k=2, num_outputs=3, **parts)


def emptied(norm):
    norm.running_mean = norm.running_var = None
    return norm


WITHOUT = {
    "1d": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "2d": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "2d, no scale": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "3d": lambda: nn.BatchNorm3d(4, track_running_stats=False),
    "over ranks": lambda: nn.SyncBatchNorm(4, track_running_stats=False),
    "lazy": lambda: nn.LazyBatchNorm2d(track_running_stats=False),
    "timm's with an activation": lambda: BatchNormAct2d(4, track_running_stats=False),
    "taken away": lambda: emptied(nn.BatchNorm2d(4)),
    "by torch.func": lambda: torch.func.replace_all_batch_norm_modules_(nn.BatchNorm2d(4)),
    "in evaluation": lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_an_expert_without_running_statistics_is_refused_by_number_and_layer(kind):
    norm = WITHOUT[kind]()
    layer = re.escape(f"experts[1] (Sequential): layer '1.0' ({type(norm).__name__})")
    with pytest.raises(ValueError, match=layer + ".*track_running_stats=True, or take GroupNorm"):
        hub(None, norm)
    with pytest.raises(ValueError, match=r"experts\[1\]: its BatchNorm keeps no running"):
        reference.ReferenceHubPathway([expert(), expert(norm)], None, None)


def untracked(norm):
    norm.track_running_stats = False  # the buffers stay, and evaluation reads them
    return norm


WITH = {
    "as usual": lambda: nn.BatchNorm2d(4),
    "a plain mean over batches": lambda: nn.BatchNorm2d(4, momentum=None),
    "no longer updated": lambda: untracked(nn.BatchNorm2d(4)),
    "torchvision's frozen": lambda: FrozenBatchNorm2d(4),
    "of each sample": lambda: nn.InstanceNorm2d(4),
    "of groups": lambda: nn.GroupNorm(2, 4),
    "lazy": lambda: nn.LazyBatchNorm2d(),
}


@pytest.mark.parametrize("kind", WITH)
def test_what_evaluates_samples_one_by_one_is_taken(kind):
    """One sample gives what it gives among others: float32 sums of 256 terms of about 0.1."""
    torch.manual_seed(0)
    norm, x = WITH[kind](), torch.randn(9, 3, 8, 8)
    norm(torch.randn(2, 4, 8, 8))  # a lazy one gets its parameters from a batch
    model = hub(None, norm)
    model(x)
    model.eval()
    torch.testing.assert_close(model(x[:1]), model(x)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("executor", ["sequential", "threads"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_experts_of_torch_script_are_held_to_the_same(executor):
    """Expert 1 gets one row, and normalises it by its running statistics."""
    norm = nn.BatchNorm1d(3)
    experts = [
        torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), layer))
        for layer in (nn.BatchNorm1d(3), norm)
    ]
    clean = torch.zeros(5, 2)
    clean[:4, 0] = clean[4, 1] = 50.0
    generator = TableGenerator(clean, torch.zeros(5, 2))
    model = hp.HubPathway(experts, generator, k=1, num_outputs=3, executor=executor)
    x = torch.randn(5, 4)
    out = model(x)
    assert out.routing.counts() == [4, 1]
    with torch.no_grad():
        expected = experts[1].eval()(x[4:])
    torch.testing.assert_close(out.expert_outputs[4:], expected)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    untracked = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"experts\[0\] \(RecursiveScriptModule\): layer '1'"):
        hp.HubPathway([torch.jit.script(untracked)], generator, k=1, num_outputs=3)
    traced = torch.jit.trace(untracked, torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm1d\) has no running"):
        hp.HubPathway([traced], generator, k=1, num_outputs=3)


def test_generator_aggregator_and_added_experts_are_held_to_the_same():
    class Generator(TableGenerator):
        def __init__(self):
            super().__init__(torch.zeros(9, 2), torch.zeros(9, 2))
            self.norm = nn.BatchNorm1d(2, track_running_stats=False)

    with pytest.raises(ValueError, match="generator: layer 'norm'"):
        hub(None, None, generator=Generator())
    aggregator = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="aggregator: layer '0'"):
        hub(None, None, aggregator=aggregator)
    model = hub(None, None, generator=hp.PathwayGenerator(2, width=2))
    with pytest.raises(ValueError, match=r"module: layer '1.0' \(BatchNorm2d\)"):
        model.add_expert(expert(nn.BatchNorm2d(4, track_running_stats=False)))
    assert len(model.experts) == 2


def test_a_hub_of_modules_says_so_with_all_else_that_is_wrong():
    broken = expert(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(HubError) as caught:
        build_experts(["test_resnet", broken, "no_such_model"], 3, False, 8)
    assert len(caught.value.problems) == 2
    assert "expert 1 (Sequential): layer '1.0' (BatchNorm2d) has no running" in str(caught.value)


def test_the_layer_is_named_even_where_it_refuses_the_image_that_the_network_is_tried_with():
    pooled = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    with pytest.raises(HubError, match=r"^expert 0 .*layer '2' .BatchNorm2d. has no running") as e:
        build_experts([pooled], 3, False, 8)
    assert len(e.value.problems) == 1
