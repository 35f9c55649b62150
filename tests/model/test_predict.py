"""Prediction without pathway noise, whatever the mode."""

import pytest
import torch
from support.pathway import CLOSE, build, conv_expert
from torch import nn


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
