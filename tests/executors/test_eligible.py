"""Which experts may be padded in training, and which layer speaks against the others."""

from importlib import import_module

import pytest
import timm
import torch
import torchvision
from timm.layers import (
    BatchNormAct2d,
    DropBlock2d,
    EvoNorm2dB0,
    EvoNorm2dB1,
    EvoNorm2dB2,
    EvoNorm2dS0,
    InplaceAbn,
    SplitBatchNorm2d,
)
from torch import nn
from torchvision.transforms.v2 import CutMix

import hubpath_fast as hp
from hubpath_fast.executors.graphs.eligible import couples_rows, refusal
from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.landmarks.head import HeatmapHead


class Custom(nn.Module):
    def __init__(self, body=None):
        super().__init__()
        self.body = nn.Linear(2, 2) if body is None else body

    def forward(self, x):
        return self.body(x)


class RowWise(Custom):
    row_wise = True


class Heir(RowWise):
    """Its forward may be another: it would have to say so again."""


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x)


class Renamed(nn.BatchNorm2d):
    """No more than a name."""


def replaced(module):
    module.forward = lambda x: x - x.mean(0)
    return module


def compiled(module):
    module.compile(backend="eager")
    return module


# Layers that the others of an expert in training may be padded with.
ALONE = {
    "BatchNorm": lambda: nn.Sequential(
        nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), BatchNormAct2d(2), Renamed(2)
    ),
    "no statistics": lambda: nn.BatchNorm2d(2, track_running_stats=False),
    "other norms": lambda: nn.Sequential(
        nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.RMSNorm(2), nn.InstanceNorm2d(2), EvoNorm2dS0(8)
    ),
    "frozen": lambda: torchvision.ops.FrozenBatchNorm2d(2),
    "attention over a row's own": lambda: nn.MultiheadAttention(2, 1, batch_first=True),
    "a transformer": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, batch_first=True), 1, enable_nested_tensor=False
    ),
    "recurrent": lambda: nn.LSTM(2, 2, batch_first=True),
    "over its own dimension": lambda: nn.Sequential(
        nn.Softmax(-1), nn.Softmax(1), nn.Flatten(), nn.Unflatten(1, (1, 2)), nn.GLU()
    ),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), timm.layers.DropPath(0.5)),
    "stochastic depth": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
    "blocks that are not dropped": lambda: DropBlock2d(0.0),
    "a class that says so": RowWise,
    "a class of the package's own choice of forward": lambda: timm.create_model("fasternet_t0"),
    "the landmarks' head": lambda: HeatmapHead(8, 2, 16),
    "Rainbow": lambda: RainbowNetwork(4, hidden=8),
    "torchvision": lambda: torchvision.models.mobilenet_v3_small(),
}

# Each as a layer of an expert, with the end of the reason.
COUPLED = {
    "EvoNorm2dB0": (lambda: EvoNorm2dB0(8), "may mix rows"),
    "EvoNorm2dB1": (lambda: EvoNorm2dB1(8), "may mix rows"),
    "EvoNorm2dB2": (lambda: EvoNorm2dB2(8), "may mix rows"),
    "InplaceAbn": (lambda: InplaceAbn(8), "may mix rows"),
    "SplitBatchNorm2d": (lambda: SplitBatchNorm2d(8), "may mix rows"),
    "DropBlock2d": (lambda: DropBlock2d(0.1), "may mix rows"),
    "DropBlock2d of torchvision": (
        lambda: torchvision.ops.DropBlock2d(0.1, 3), "may mix rows",
    ),
    "DropBlock3d": (lambda: torchvision.ops.DropBlock3d(0.1, 3), "may mix rows"),
    "Dct2dStats": (
        lambda: import_module("timm.models.csatv2").Dct2dStats(8), "may mix rows",
    ),
    "LocalWindowAttention": (
        lambda: timm.models.efficientvit_msra.LocalWindowAttention(16, 4, 2), "may mix rows",
    ),
    "LinearNorm": (
        lambda: timm.models.levit.LinearNorm(2, 2), "may mix rows",
    ),
    "RPNHead": (
        lambda: torchvision.models.detection.rpn.RPNHead(2, 1), "may mix rows",
    ),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(2), "may mix rows"),
    "Louder": (lambda: Louder(2), "may mix rows"),
    "BatchNorm2d": (lambda: replaced(nn.BatchNorm2d(2)), "may mix rows"),
    "ReLU": (lambda: replaced(nn.ReLU()), "may mix rows"),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(2, track_running_stats=True), "may mix rows",
    ),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(2, 1), "may mix rows"),
    "GRU": (lambda: nn.GRU(2, 2), "may mix rows"),
    "Softmax": (lambda: nn.Softmax(0), "may mix rows"),
    "LogSoftmax": (lambda: nn.LogSoftmax(None), "may mix rows"),
    "Flatten": (lambda: nn.Flatten(0), "may mix rows"),
    "Embedding": (lambda: nn.Embedding(2, 2, max_norm=1), "may mix rows"),
    "Heir": (Heir, "may mix rows"),
    "Custom": (Custom, "may mix rows"),
    "CutMix": (lambda: CutMix(num_classes=2), "may mix rows"),
    "RecursiveScriptModule": (lambda: torch.jit.script(nn.ReLU()), "is scripted"),
    "Linear": (lambda: compiled(nn.Linear(2, 2)), "is compiled"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_these_treat_rows_alone(name):
    assert couples_rows(ALONE[name]().train()) is None


@pytest.mark.parametrize("name", COUPLED)
def test_these_may_not_and_are_named(name):
    make, reason = COUPLED[name]
    layer = make()
    kind = name.partition(" ")[0]
    expert = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), layer))
    assert couples_rows(expert) == f"1.1 ({kind}) {reason}"
    assert couples_rows(layer) == f"itself ({kind}) {reason}"
    if not isinstance(layer, torch.jit.ScriptModule):
        assert couples_rows(expert.eval()) is None  # as all are in evaluation


def test_each_layer_counts_in_the_mode_that_it_is_in():
    expert = nn.Sequential(nn.ReLU(), EvoNorm2dB0(8), DropBlock2d(0.1))
    expert[1:].eval()
    assert couples_rows(expert) is None
    expert[2].train()
    assert couples_rows(expert) == "2 (DropBlock2d) may mix rows"


def test_statistics_of_the_batch_in_evaluation():
    expert = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    reason = "1 (BatchNorm2d) takes its statistics from the batch in evaluation"
    assert couples_rows(expert) == reason
    assert couples_rows(expert.train()) is None


NAMES = [
    "timm/test_resnet", "timm/test_efficientnet", "timm/test_vit", "timm/test_byobnet",
    "torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/maskrcnn_resnet50_fpn",
    "torchvision/deeplabv3_resnet50",
]  # fmt: skip


def test_experts_of_a_hub_can_be_padded():
    with torch.device("meta"):
        experts = hp.create_model(NAMES, num_outputs=5, k=2, pretrained=False).experts
    assert [couples_rows(expert) for expert in experts] == [None] * len(NAMES)


def test_statistics_across_processes_are_not_captured():
    expert = nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(2))
    assert refusal(expert) == (
        "1 (SyncBatchNorm) exchanges statistics with other processes, which a replay cannot; take "
        "BatchNorm"
    )
    assert refusal(expert.eval()) is None
    expert.train()[1] = timm.layers.norm_act.SyncBatchNormAct(2)
    assert refusal(expert).startswith("1 (SyncBatchNormAct) exchanges")
