"""Prediction without pathway noise, whatever the mode; experts and generator of bytes."""

import pytest
import torch
from support.pathway import CLOSE, TableGenerator, build, conv_expert
from torch import nn

import hubpath_fast as hp


class Noisy(nn.Module):
    """An expert with noise of its own in training mode, as a noisy layer has."""

    def __init__(self):
        super().__init__()
        self.linear, self.noise = nn.Linear(48, 7), 0.0

    def forward(self, x):
        return self.linear(x.flatten(1)) + (self.noise if self.training else 0.0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_predict_is_evaluation_with_parts_in_their_own_mode(k):
    ours, truth, x, *_ = build(10, 3, k, expert=Noisy)
    state = torch.get_rng_state()
    found = ours.predict(x)
    assert type(found) is torch.Tensor
    assert torch.equal(torch.get_rng_state(), state)  # no pathway noise was drawn
    torch.testing.assert_close(found, truth.eval()(x), **CLOSE)
    assert all(module.training for module in ours.modules())

    for i, (expert, twin) in enumerate(zip(ours.experts, truth.experts, strict=True)):
        expert.noise = 0.5 * i + 1
        twin.linear.bias.data += expert.noise  # in evaluation, what the other adds in training
    torch.testing.assert_close(ours.predict(x), truth(x), **CLOSE)
    ours.eval()
    assert torch.equal(ours.predict(x), ours(x))
    assert not torch.allclose(ours.predict(x), truth(x))


def test_predict_of_a_model_in_training_moves_what_training_moves():
    ours, _, x, *_ = build(6, 2, 2, expert=conv_expert)
    ours.predict(x)
    assert ours.experts[0][1].num_batches_tracked == 1


def test_predict_has_gradients_unless_they_are_off():
    ours, _, x, *_ = build(6, 3, 2)
    ours.predict(x).sum().backward()
    assert ours.generator.clean.grad.abs().sum() > 0
    assert ours.generator.noise.grad is None or ours.generator.noise.grad.abs().sum() == 0
    with torch.no_grad():
        assert not ours.predict(x).requires_grad


def test_predict_refuses_what_forward_refuses():
    ours, _, x, *_ = build(6, 3, 2)
    with pytest.raises(ValueError, match="x: empty batch"):
        ours.predict(x[:0])


class Bytes(nn.Module):
    """Takes uint8, and nothing else."""

    def __init__(self, num_outputs=7):
        super().__init__()
        self.head = nn.Linear(4 * 9 * 5, num_outputs)

    def forward(self, x):
        assert x.dtype == torch.uint8, x.dtype
        return self.head(x.flatten(1).to(self.head.weight.dtype) / 255)


class BytesGenerator(TableGenerator):
    takes_uint8 = True

    def forward(self, x):
        assert x.dtype == torch.uint8, x.dtype
        return super().forward(x)


@pytest.mark.parametrize("k", [1, 2])
def test_bytes_reach_experts_and_generator_as_they_are(k):
    """Three dimensions beside the samples, of which none is an image's: packed frames."""
    x = torch.randint(0, 256, (6, 4, 9, 5), dtype=torch.uint8)
    generator = BytesGenerator(torch.randn(6, 2), torch.randn(6, 2))
    model = hp.HubPathway([Bytes(), Bytes()], generator, k=k, num_outputs=7)
    p = torch.softmax(generator.clean, 1)
    outputs = torch.stack([expert(x) for expert in model.experts], 1)
    kept = p * (p >= p.max(1, keepdim=True).values) if k == 1 else p
    # float32: two products of about 1 and their sum
    expected = (kept[:, :, None] * outputs).sum(1)
    torch.testing.assert_close(model.predict(x), expected, rtol=1e-5, atol=1e-5)
    out = model(x)
    assert out.expert_outputs.shape == (6 * k, 7)
    assert hp.HubPathwayLoss()(out, torch.arange(6)).total.isfinite()


def test_a_generator_of_floats_still_refuses_bytes():
    model = hp.HubPathway([Bytes(), Bytes()], TableGenerator(torch.zeros(3, 2), torch.zeros(3, 2)))
    with pytest.raises(ValueError, match=r"uint8 images need .*takes_uint8 = True"):
        model(torch.zeros(3, 4, 9, 5, dtype=torch.uint8))
