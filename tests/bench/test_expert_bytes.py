"""What a step moves, where it can be counted by hand."""

import pytest
import torch
from torch import nn

from bench import expert_bytes


class Block(nn.Module):
    """A residual block whose ends are convolutions, so that each BatchNorm is followed by one."""

    def __init__(self, width=64):
        super().__init__()
        self.first, self.last = (nn.Conv2d(width, width, 1, bias=False) for _ in range(2))
        self.norm, self.activation = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.stem = nn.Conv2d(3, width, 1, bias=False)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.activation(self.norm(self.first(x)) + x))


@pytest.mark.parametrize(("mask", "passes"), [(False, 20), (True, 15)])
def test_passes_of_a_residual_block(mask, passes):
    """Over the one normalised map, whatever its size; of channels there are few.

    torch's: BatchNorm 3, the sum 3, ReLU 2, backward ReLU 3, BatchNorm 5. Masked: 4 (x twice, the
    residual, y), backward 7 (d_y, y and x are read and g is written; g and x are read and d_x is
    written). Both: 1 of the result's sum, and 3 to add up the two gradients of the block's input.
    """
    model = Block().to("meta", torch.bfloat16)
    found = expert_bytes.step_bytes(model, 8, 16, mask)
    found = found["others"] / expert_bytes.normalised_bytes(model, 8, 16)
    assert found == pytest.approx(passes, rel=1e-2)


def test_what_is_patched_is_put_back():
    pick = expert_bytes._backends.choose
    with expert_bytes.kernels_are_taken():
        assert expert_bytes._backends.choose(None, torch.ones(1)) is expert_bytes.kernels
    assert expert_bytes._backends.choose is pick
