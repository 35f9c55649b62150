"""Zoo-Tuning's mixed linear layers against explicit loops over samples and experts.

In float64 the two orders of computation differ by roundings of some 1e-15 a term, over fewer than
1e3 terms: relative errors stay far below CLOSE.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubpath_fast.baselines import ZooTuning, zoo_layers
from hubpath_fast.baselines.zoo_layers import MixedLinear, outputs_are_cheaper
from hubpath_fast.baselines.zoo_tuning import mixed_network
from hubpath_fast.hub import Expert

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
N, M, I, O = 4, 3, 5, 6  # noqa: E741


def layers(bias=True, count=M):
    torch.manual_seed(0)
    return [nn.Linear(I, O, bias=bias, dtype=torch.float64) for _ in range(count)]


def moved(layer):
    """Away from its start: other alignments, a gate that tells samples apart."""
    with torch.no_grad():
        layer.gate[2].weight.normal_()
        if layer.alignment is not None:
            layer.alignment.add_(0.3 * torch.randn_like(layer.alignment))
    return layer


def by_loops(layer, plain, x, coefficients):
    samples = []
    for sample, row in zip(x, coefficients, strict=True):
        total = 0
        for m, one in enumerate(plain):
            weight = layer.kernels[m * O : (m + 1) * O]
            if layer.alignment is not None:
                weight = layer.alignment[m] @ weight
            bias = None if one.bias is None else layer.biases[m * O : (m + 1) * O]
            total = total + row[m] * F.linear(sample, weight, bias)
        samples.append(total)
    return torch.stack(samples)


def gate_by_hand(layer, pooled):
    first, _, second = layer.gate
    hidden = (pooled @ first.weight.T).clamp(min=0)
    return 1 / (1 + torch.exp(-(hidden @ second.weight.T + second.bias)))


@pytest.mark.parametrize("by_outputs", [False, True], ids=["kernels", "outputs"])
@pytest.mark.parametrize("between", [(), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize(("align", "bias"), [(True, True), (False, True), (True, False)])
def test_a_mixed_layer_is_the_loop(between, align, bias, by_outputs, monkeypatch):
    monkeypatch.setattr(zoo_layers, "outputs_are_cheaper", lambda *_, **__: by_outputs)
    plain = layers(bias)
    layer = moved(MixedLinear(plain, align=align))
    x = torch.randn(N, *between, I, dtype=torch.float64, requires_grad=True)
    pooled = x.reshape(N, -1, I).mean(1)
    inputs = {"x": x, **dict(layer.named_parameters())}
    y = layer(x)
    expected = by_loops(layer, plain, x, gate_by_hand(layer, pooled))
    torch.testing.assert_close(y, expected, **CLOSE)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs.values(), upstream)
    wanted = torch.autograd.grad(expected, inputs.values(), upstream)
    for key, a, b in zip(inputs, found, wanted, strict=True):
        assert b.abs().max() > 0, key
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_a_mixed_layer_starts_as_the_mean_of_the_experts():
    plain = layers()
    layer = MixedLinear(plain, align=True)
    assert torch.equal(layer.alignment, torch.eye(O, dtype=torch.float64).repeat(M, 1, 1))
    x = torch.zeros(N, 2, I, dtype=torch.float64)
    x[:, 0], x[:, 1] = 1, -1  # the gate sees nothing
    expected = torch.stack([one(x) for one in plain]).mean(0)
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    assert MixedLinear(plain).alignment is None


def test_the_cheaper_order_of_a_linear_layer():
    """One row a sample: outputs, as a mixed matrix for each of 32 would be read once. Many: mix."""
    assert outputs_are_cheaper(1, 32, 32, (256, 576), 2, 1, True)
    assert not outputs_are_cheaper(225, 32, 32, (32, 100), 2, 1, True)


def test_a_lite_layer_takes_the_batch_and_merges():
    plain = layers()
    layer = moved(MixedLinear(plain, lite=True, align=True))
    x = torch.randn(N, I, dtype=torch.float64)
    mean = gate_by_hand(layer, x).mean(0, keepdim=True)
    with torch.no_grad():
        expected = by_loops(layer, plain, x, mean.expand(N, -1))
        torch.testing.assert_close(layer(x), expected, **CLOSE)
        torch.testing.assert_close(layer.average, 0.9 / M + 0.1 * mean[0], **CLOSE)
        layer.eval()
        merged = layer.merged()
        assert type(merged) is nn.Linear
        torch.testing.assert_close(merged(x), layer(x), **CLOSE)
        torch.testing.assert_close(
            layer(x), by_loops(layer, plain, x, layer.average.expand(N, -1)), **CLOSE
        )


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"plain nn\.Linear layers, .* what a Scaled makes"):
        MixedLinear([Scaled(2, 2), Scaled(2, 2)])
    normed = [nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match="what a ParametrizedLinear makes"):
        MixedLinear(normed)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.middle = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.middle(self.stem(x).mean((2, 3))).relu())


def experts():
    torch.manual_seed(0)
    return [Expert("mine", Body().double(), (0.5,) * 3, (0.5,) * 3, 8) for _ in range(2)]


@pytest.mark.parametrize("lite", [False, True], ids=["images", "lite"])
def test_linear_layers_are_mixed_where_asked(lite):
    """With one-hot coefficients the body is that expert's; by default the layer is the average."""
    both = experts()
    model = ZooTuning(both, lite, linear=True).double().eval()
    assert type(model.module.middle) is MixedLinear
    assert type(model.module.fc) is nn.Linear
    for layer in (model.module.stem, model.module.middle):
        nn.init.zeros_(layer.gate[2].weight)
        layer.gate[2].bias.data = torch.tensor([-1e4, 1e4], dtype=torch.float64)
        if lite:
            layer.average.copy_(torch.tensor([0.0, 1.0]))
    x = torch.rand(N, 3, 8, 8, dtype=torch.float64)
    second = both[1].module
    second.fc = both[0].module.fc
    with torch.no_grad():
        torch.testing.assert_close(model(x), second((x - 0.5) / 0.5), **CLOSE)
        if lite:
            plain = model.merged()
            assert type(plain.module.middle) is nn.Linear
            torch.testing.assert_close(plain(x), model(x), **CLOSE)
    averaged = ZooTuning(experts())
    assert type(averaged.module.middle) is nn.Linear


def test_a_network_without_a_layer_to_mix_counts_none():
    pair = [nn.Sequential(nn.Flatten(), nn.Linear(3, 2)) for _ in range(2)]
    module, count = mixed_network(pair, {nn.Conv2d: None})
    assert count == 0
    torch.testing.assert_close(module[1].weight, (pair[0][1].weight + pair[1][1].weight) / 2)
    module, count = mixed_network(pair, {nn.Linear: MixedLinear})
    assert count == 1
    assert type(module[1]) is MixedLinear
