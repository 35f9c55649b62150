"""Whole networks of timm and torchvision: with padded rows they give what they give without."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from support.masked import (
    assert_same,
    counted,
    exact_run,
    masked_run,
    padded,
    some_gradient,
    stirred,
)
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.densenet import DenseNet
from timm.models.resnet import Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

from hubpath_fast import functional as HF
from hubpath_fast.executors.graphs.eligible import couples_rows
from hubpath_fast.executors.graphs.masked import masked

COUNT, CAPACITY, SIDE, CLASSES = 5, 8, 64, 7
# Of float64: roundings of some 50 layers, amplified by BatchNorm over a few positions.
TOLERANCE = 1e-8

PLAIN, RELU, RELU6 = (None, False), ("relu", False), ("relu6", False)
SUM, SUM_RELU = (None, True), ("relu", True)
SILU, HARDSWISH = ("silu", False), ("hardswish", False)


def narrow_resnet50(**settings):
    return ResNet(
        Bottleneck, [3, 4, 6, 3], num_classes=CLASSES, channels=(8, 16, 32, 64), **settings
    )


def preact_resnet():
    return ResNetV2(
        [2, 2], (32, 64), CLASSES, stem_chs=16, conv_layer=create_conv2d, norm_layer=BatchNormAct2d
    )


def with_biases():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8, momentum=None), nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8, affine=False), nn.GELU(), nn.Flatten(),
        nn.Linear(8 * 15 * 15, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def timm_network(name):
    return lambda: timm.create_model(name, num_classes=CLASSES, drop_rate=0.0)


def torchvision_network(name):
    return lambda: torchvision.models.get_model(name, num_classes=CLASSES, weights=None)


# Each with what its BatchNorm layers are computed with: all layers of it, once.
NETWORKS = {
    # The stem's, two in each block, then the sum; four of shortcuts have nothing after them.
    "timm resnet50": (narrow_resnet50, {RELU: 33, SUM_RELU: 16, PLAIN: 4}),
    "timm mobilenetv3": (
        timm_network("mobilenetv3_small_050"), {HARDSWISH: 18, RELU: 5, PLAIN: 4, SUM: 7},
    ),
    "timm efficientnet": (timm_network("test_efficientnet"), {SILU: 9, PLAIN: 4}),
    "timm regnet": (timm_network("regnetx_002"), {RELU: 27, SUM_RELU: 13, PLAIN: 4}),
    # Each block normalises first: three in each of four, and one after the last.
    "timm resnetv2": (preact_resnet, {RELU: 13}),
    "timm densenet": (
        lambda: DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_classes=CLASSES),
        {RELU: 21},
    ),
    "torchvision resnet18": (torchvision_network("resnet18"), {RELU: 9, SUM_RELU: 8, PLAIN: 3}),
    "torchvision mobilenet_v2": (
        torchvision_network("mobilenet_v2"), {RELU6: 35, PLAIN: 7, SUM: 10},
    ),
    "torchvision mobilenet_v3": (
        torchvision_network("mobilenet_v3_small"), {HARDSWISH: 18, RELU: 5, PLAIN: 5, SUM: 6},
    ),
    "biases before, and BatchNorm1d": (with_biases, {RELU6: 1, PLAIN: 1, SILU: 1}),
}  # fmt: skip


def rows():
    torch.manual_seed(1)
    return torch.randn(COUNT, 3, SIDE, SIDE, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_padded_rows_change_nothing(name, monkeypatch):
    make, expected = NETWORKS[name]
    module, x = stirred(make()), rows()
    assert couples_rows(module) is None
    exact = exact_run(module, x, some_gradient)
    for junk in (False, True):
        with counted(monkeypatch) as calls:
            run = masked_run(module, padded(x, CAPACITY, junk), COUNT, some_gradient)
        assert calls == expected
        assert_same(run, exact, TOLERANCE)


def test_a_full_group_has_no_padding():
    module, x = stirred(narrow_resnet50()), rows()
    run = masked_run(module, x, COUNT, some_gradient)
    assert_same(run, exact_run(module, x, some_gradient), TOLERANCE)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_kernels_do_the_same(layout, device, monkeypatch):
    module = ResNet(Bottleneck, [1] * 4, num_classes=CLASSES, channels=(4, 4, 8, 8))
    module, x = stirred(module).to(device, memory_format=layout), rows()[..., :32, :32].to(device)
    exact = exact_run(module, x, some_gradient)
    x = padded(x, CAPACITY, True).contiguous(memory_format=layout)
    triton = partial(HF.masked_batch_norm, backend="triton")
    monkeypatch.setattr(HF, "masked_batch_norm", triton)
    assert_same(masked_run(module, x, COUNT, some_gradient), exact, TOLERANCE)


def test_frozen_backbones_keep_their_own_statistics(monkeypatch):
    module = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    module = stirred(module)
    for buffer in module.buffers():
        buffer.uniform_(0.5, 1.5)
    x = rows()
    assert couples_rows(module) is None
    with counted(monkeypatch) as calls:
        run = masked_run(module, padded(x, CAPACITY, True), COUNT, some_gradient)
    assert not calls
    assert_same(run, exact_run(module, x, some_gradient), TOLERANCE)


def test_a_partly_frozen_network(monkeypatch):
    module, x = stirred(narrow_resnet50()), rows()
    for part in (module.conv1, module.bn1, module.layer1):
        part.requires_grad_(False)
    module.layer1.eval()  # its 10 layers use, and keep, their running statistics
    with counted(monkeypatch) as calls:
        run = masked_run(module, padded(x, CAPACITY, True), COUNT, some_gradient)
    assert sum(calls.values()) == 53 - 10
    assert_same(run, exact_run(module, x, some_gradient), TOLERANCE)


def test_checkpoints_move_statistics_as_often_as_without_padding():
    module, x = stirred(narrow_resnet50()), rows()
    module.set_grad_checkpointing()
    exact = exact_run(module, x, some_gradient)
    assert {2} == {int(exact.buffers[f"layer2.{i}.bn1.num_batches_tracked"]) for i in range(4)}
    run = masked_run(module, padded(x, CAPACITY, True), COUNT, some_gradient)
    assert_same(run, exact, TOLERANCE)


def test_what_is_drawn_by_row_does_not_see_the_padding():
    module = stirred(narrow_resnet50(drop_path_rate=0.3, drop_rate=0.3))
    runs = []
    for junk in (False, True):
        x = padded(rows(), CAPACITY, junk)
        torch.manual_seed(2)
        runs.append(masked_run(module, x, COUNT, some_gradient))
    assert_same(*runs, TOLERANCE)
    plain = masked_run(stirred(narrow_resnet50()), x, COUNT, some_gradient)
    assert (runs[0].outputs - plain.outputs).abs().max() > 0.01  # something was dropped


def test_nothing_of_the_module_is_changed():
    module = stirred(narrow_resnet50())
    before = [dict(vars(part)) for part in module.modules()]
    names = list(module.state_dict())
    for error in (None, ValueError):
        try:
            with masked(module, torch.tensor(COUNT, dtype=torch.int32)):
                assert list(module.state_dict()) == names
                assert "forward" in vars(module.bn1)
                if error is not None:
                    raise error
        except ValueError:
            pass
        assert [vars(part) for part in module.modules()] == before
