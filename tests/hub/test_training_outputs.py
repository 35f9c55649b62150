"""Networks that give several outputs, in training mode above all, are found when a hub is built."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision import models

from hubpath_fast.hub import HubError, build_experts, create_model
from hubpath_fast.hub.outputs import describe, output_refusal
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.source import PlainTask, training_refusal

C = 5


class Own(nn.Module):
    """Logits by way of BatchNorm and dropout, handed out as ``training`` and ``evaluation`` say."""

    def __init__(self, training=lambda y: y, evaluation=lambda y: y):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, C), nn.BatchNorm1d(C)
        self.outputs = {True: training, False: evaluation}
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        random.random()
        np.random.random()
        torch.rand(())
        y = nn.functional.dropout(self.norm(self.layer(x.mean((2, 3)))), training=self.training)
        return self.outputs[self.training](y)


class Both(NamedTuple):
    logits: torch.Tensor
    aux: torch.Tensor | None


@dataclass
class Fields:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


WRAP = "one tensor: wrap it in a module that returns the one that counts"
IN_TRAINING = {
    "tuple": (lambda y: (y, y), rf"is a tuple of \[2, 5\], \[2, 5\], and the task needs {WRAP}"),
    "list": (lambda y: [y], r"is a list of \[2, 5\], and"),
    "dict": (lambda y: {"out": y}, r"is a dict of 'out' \[2, 5\], and"),
    "named": (lambda y: Both(y, None), r"is a Both of logits \[2, 5\], aux None, and"),
    "dataclass": (Fields, r"is a Fields of logits \[2, 5\], loss None, and"),
    "None": (lambda y: None, r"is None, and"),
    "fewer": (lambda y: y[:, :3], r"for an image in training mode is \[3\], and .* needs \[5\]"),
    "of the batch": (lambda y: y.sum(0), r"a batch of 2 in training mode is \[5\], .* \[2, 5\]"),
    "integers": (lambda y: y.long(), r"is torch.int64, and the task needs floating-point numbers"),
    "error": (lambda y: y[:, 7], r"in training mode: index 7 is out of bounds"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_outputs_in_training_are_looked_at(kind):
    change, message = IN_TRAINING[kind]
    with pytest.raises(HubError, match=r"module Own does not map images \[n, 3, 8, 8\]") as caught:
        build_experts([Own(), Own(training=change)], C, input_size=8)
    assert len(caught.value.problems) == 1
    with pytest.raises(HubError, match=message):
        create_model([Own(training=change)], C, k=1, input_size=8)
    if kind != "error":
        with pytest.raises(HubError, match=message.split("in training")[0].replace("2", r"\d")):
            build_experts([Own(evaluation=change)], C, input_size=8)


def test_looking_changes_nothing():
    module = Own().train()
    module.norm.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    build_experts([module], C, input_size=8)
    drawn = random.random(), np.random.random(), torch.rand(())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert drawn == (random.random(), np.random.random(), torch.rand(()))
    assert (module.training, module.norm.training, module.calls) == (True, False, 0)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.device.type == "cpu"


class ByNumbers(nn.Module):
    """Depends on numbers, and on a tensor that is neither a parameter nor a buffer."""

    def __init__(self, training=lambda y: y):
        super().__init__()
        self.layer, self.mean, self.outputs = nn.Linear(3, C), torch.full((3,), 0.1), training
        self.computed = self.layer.weight * 1  # as weight_norm leaves one: it has no copy

    def forward(self, x):
        y = self.layer(x.mean((2, 3)) - self.mean)
        y = y if y.sum().item() < 1e9 else -y
        return self.outputs(y) if self.training else y


def test_a_network_whose_numbers_decide_is_run_on_its_own_device():
    module = ByNumbers()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert build_experts([module], C, input_size=8)[0].module is module
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert module.layer.weight.device.type == "cpu"
    with pytest.raises(HubError, match=r"in training mode is a tuple of \[2, 5\], \[2, 5\]"):
        build_experts([ByNumbers(lambda y: (y, y))], C, input_size=8)


def test_a_module_of_another_precision_or_with_nan_is_refused():
    for kind in (torch.float64, torch.float16):
        message = rf"module Own does not map .*dtype.*its weights are {kind}.*module.float\(\)"
        with pytest.raises(HubError, match=message):
            build_experts([Own().to(kind)], C, input_size=8)
    diverged = Own()
    diverged.norm.running_var[1] = float("nan")
    message = r"module Own holds NaN, .* in 1 tensors, the first norm.running_var; load other"
    with pytest.raises(HubError, match=message):
        build_experts([diverged], C, input_size=8)


def test_torchvisions_auxiliary_heads():
    options = {"num_classes": C, "init_weights": False}
    for make, size in ((models.googlenet, 96), (models.inception_v3, 299)):
        with torch.device("meta"):
            whole, plain = make(**options), make(**options, aux_logits=False)
        found = output_refusal(whole, (C,), size, training=True)
        assert "in training mode is a" in found
        assert "logits [2, 5], aux_logits" in found
        assert "build it with aux_logits=False, or wrap it" in found
        assert output_refusal(plain, (C,), size, training=True) is None
    # Those of the hub are built without.
    names = ["torchvision/googlenet", "torchvision/inception_v3", "timm/inception_v3"]
    for name in names:
        assert training_refusal(find(name), PlainTask(C), 128) is None


def test_torchvisions_networks_for_other_tasks():
    with torch.device("meta"):
        segmentation = models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=C
        )
    found = output_refusal(segmentation, (C,), 64)
    assert found.startswith("its output is an OrderedDict of 'out' [1, 5, 64, 64], and")


def test_timms_distilled_networks(tmp_path):
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=C)
    assert output_refusal(network, (C,), 224, training=True) is None
    network.set_distilled_training(True)
    with pytest.raises(HubError, match=r"a tuple of .*: call its set_distilled_training\(False\)"):
        build_experts([network], C, input_size=224)


def test_a_folder_whose_network_gives_more_in_training(tmp_path, monkeypatch):
    config = {"architecture": "test_resnet", "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    forward = timm.models.ResNet.forward

    def twice(self, x):
        return (forward(self, x),) * 2 if self.training else forward(self, x)

    monkeypatch.setattr(timm.models.ResNet, "forward", twice)
    with pytest.raises(HubError, match=r"local-dir:.* cannot be trained at 32 x 32: .*a tuple of"):
        build_experts([f"local-dir:{tmp_path}"], C, pretrained=False, input_size=32)


def test_outputs_in_words():
    x = torch.zeros(2, 3)
    assert describe({"a": [x, None], "b": ()}) == (
        "a dict of 'a' a list of [2, 3], None, 'b' a tuple of nothing"
    )
    assert describe(3) == "an int"
