"""Zoo-Tuning's mixed convolutions against explicit loops over images and experts.

In float64 the two orders of computation differ by roundings of some 1e-15 a term, over fewer than
1e4 terms: relative errors stay far below CLOSE.
"""

import copy

import pytest
import torch
from torch import nn

from hubpath_fast.baselines import zoo_layers
from hubpath_fast.baselines.zoo_layers import MixedConv2d, outputs_are_cheaper

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
N, M = 4, 3

LAYERS = {
    "plain": ((4, 6, 3), {}),
    "1 x 1, stride": ((4, 6, 1), {"stride": 2, "bias": False}),
    "stride, padding": ((4, 6, 3), {"stride": 2, "padding": 1, "bias": False}),
    "dilation": ((4, 6, 3), {"dilation": 2, "padding": 2}),
    "unequal sides": ((4, 6, (3, 1)), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
    "groups": ((4, 6, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((4, 4, 3), {"groups": 4, "padding": 1, "stride": 2, "bias": False}),
    "two kernels a channel": ((4, 8, 1), {"groups": 4}),
    "same, even kernel": ((4, 6, 4), {"padding": "same"}),
    "valid": ((4, 6, 3), {"padding": "valid"}),
    "reflected": ((4, 6, 3), {"padding": (2, 1), "padding_mode": "reflect"}),
}


def layers(name, count=M):
    torch.manual_seed(0)
    sizes, options = LAYERS[name]
    return [nn.Conv2d(*sizes, dtype=torch.float64, **options) for _ in range(count)]


def mixed(convolutions, lite=False):
    """A mixed layer away from its start: other alignments, a gate that tells images apart."""
    layer = MixedConv2d(convolutions, lite)
    with torch.no_grad():
        layer.gate[2].weight.normal_()
        if layer.alignment is not None:
            layer.alignment.add_(0.3 * torch.randn_like(layer.alignment))
    return layer


def by_loops(layer, convolutions, x, coefficients):
    """One image after another, one expert after another, each by its own convolution."""
    images = []
    for image, row in zip(x, coefficients, strict=True):
        total = 0
        for m, convolution in enumerate(convolutions):
            plain = copy.deepcopy(convolution)
            weight = layer.kernels.unflatten(0, (M, -1))[m]
            if layer.alignment is not None:
                weight = torch.einsum("op,pikl->oikl", layer.alignment[m], weight)
            tensors = {"weight": weight}
            if layer.biases is not None:
                tensors["bias"] = layer.biases.unflatten(0, (M, -1))[m]
            total = total + row[m] * torch.func.functional_call(plain, tensors, (image[None],))
        images.append(total)
    return torch.cat(images)


def gate_by_hand(layer, x):
    first, _, second = layer.gate
    hidden = (x.mean(dim=(2, 3)) @ first.weight.T).clamp(min=0)
    return 1 / (1 + torch.exp(-(hidden @ second.weight.T + second.bias)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("by_outputs", [False, True], ids=["kernels", "outputs"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_mixed_convolution_is_the_loop_over_images_and_experts(name, by_outputs, monkeypatch):
    asked = []

    def choose(positions, *_):
        asked.append(positions)
        return by_outputs

    monkeypatch.setattr(zoo_layers, "outputs_are_cheaper", choose)
    convolutions = layers(name)
    layer = mixed(convolutions)
    x = torch.randn(N, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    inputs = {"x": x, **dict(layer.named_parameters())}

    y = layer(x)
    expected = by_loops(layer, convolutions, x, gate_by_hand(layer, x))
    assert asked == [expected[0, 0].numel()]
    torch.testing.assert_close(y, expected, **CLOSE)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs.values(), upstream)
    wanted = torch.autograd.grad(expected, inputs.values(), upstream)
    for key, a, b in zip(inputs, found, wanted, strict=True):
        assert b.abs().max() > 0, key
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", LAYERS)
def test_at_its_start_a_layer_is_the_mean_of_the_experts(name):
    """Alignments are the identity, and coefficients 1/M where the gate sees nothing."""
    convolutions = layers(name)
    layer = MixedConv2d(convolutions)
    assert (layer.alignment is None) == (max(convolutions[0].kernel_size) == 1)
    x = torch.randn(N, 4, 7, 6, dtype=torch.float64)
    x -= x.mean(dim=(2, 3), keepdim=True)
    expected = torch.stack([convolution(x) for convolution in convolutions]).mean(dim=0)
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    torch.manual_seed(1)
    coefficients = layer.coefficients(torch.randn(200, 4, 1, 1, dtype=torch.float64))
    assert (coefficients - 1 / M).abs().max() < 0.05
    assert coefficients.std(dim=0).min() > 0


def test_the_cheaper_order_follows_the_map_size():
    """48 images, five experts of 96 channels. At 16 x 16 positions an expert's share is 12,288
    multiplications an element, and mixing kernels spares four of five; at 1 x 1 it is 48, and the
    alignment of weights alone is 480. A batch with one kernel mixes it sooner: at 4 x 4."""
    shape = (96, 96, 3, 3)
    assert not outputs_are_cheaper(256, 48, 48, shape, 5, 1, True)
    assert outputs_are_cheaper(1, 48, 48, shape, 5, 1, True)
    assert outputs_are_cheaper(8, 48, 48, shape, 5, 1, True)
    assert not outputs_are_cheaper(8, 48, 1, shape, 5, 1, True)
    assert not outputs_are_cheaper(256, 48, 48, (96, 1, 3, 3), 5, 96, True)


@pytest.mark.parametrize("by_outputs", [False, True], ids=["kernels", "outputs"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_lite_layer_uses_the_batch_mean_then_its_moving_average(name, by_outputs, monkeypatch):
    monkeypatch.setattr(zoo_layers, "outputs_are_cheaper", lambda *_: by_outputs)
    convolutions = layers(name)
    layer = mixed(convolutions, lite=True)
    average = torch.full((M,), 1 / M, dtype=torch.float64)
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(N, 4, 7, 6, dtype=torch.float64)
        mean = gate_by_hand(layer, x).mean(dim=0)
        expected = by_loops(layer, convolutions, x, mean.expand(N, M))
        y = layer(x)
        torch.testing.assert_close(y, expected, **CLOSE)
        upstream = torch.randn_like(y)
        parameters = list(layer.parameters())
        pairs = zip(
            torch.autograd.grad(y, parameters, upstream),
            torch.autograd.grad(expected, parameters, upstream),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, **CLOSE)
        average = 0.9 * average + 0.1 * mean.detach()
        torch.testing.assert_close(layer.average, average, **CLOSE)
    assert not layer.average.requires_grad
    assert (average - 1 / M).abs().min() > 1e-4

    layer.eval()
    expected = by_loops(layer, convolutions, x, average.expand(N, M))
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    torch.testing.assert_close(layer.merged()(x), expected, **CLOSE)
    torch.testing.assert_close(layer.average, average, **CLOSE)
