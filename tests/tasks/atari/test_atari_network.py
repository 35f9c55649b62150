"""The network: equal to two convolutions and to the streams' formula, on either form of states."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hubpath_fast.model.heads import head_names
from hubpath_fast.tasks.atari import FramePatches, RainbowNetwork, draw_noise, dueling_logits

SMALL = {"num_atoms": 7, "hidden": 16, "history": 3, "frame_shape": (13, 21), "patches": (3, 2)}


def by_convolutions(network, states):
    """The network as atari.md's protocol writes it, from frames [n, H, height, width]."""
    trunk, (p, q) = network.trunk, network.patches.patches
    first, second = trunk.kernels()
    x = states.to(first.dtype) / 255
    x = F.relu(F.conv2d(x, first, trunk.first.bias, stride=p))
    x = F.relu(F.conv2d(x, second, trunk.second.bias, stride=q))
    x = x.flatten(2).transpose(1, 2).flatten(1)  # features block by block

    def layer(noisy, x):
        noise = torch.outer(noisy.noise_out, noisy.noise_in) * noisy.training
        weight = noisy.weight_mu + noisy.weight_sigma * noise
        bias = noisy.bias_mu + noisy.bias_sigma * noisy.noise_out * noisy.training
        return F.linear(x, weight, bias)

    value = layer(network.value_out, F.relu(layer(network.value_hidden, x)))
    advantage = layer(network.advantage_out, F.relu(layer(network.advantage_hidden, x)))
    advantage = advantage.view(len(states), network.num_actions, network.num_atoms)
    return value[:, None] + advantage - advantage.mean(1, keepdim=True)


@pytest.mark.parametrize("options", [{}, SMALL], ids=["atari", "small"])
@pytest.mark.parametrize("training", [True, False])
def test_equal_to_two_convolutions_in_float64(options, training):
    network = RainbowNetwork(5, **options).double().train(training)
    draw_noise(network, torch.Generator().manual_seed(2))
    shape = options.get("frame_shape", (84, 84))
    frames = torch.randint(0, 256, (3, network.history, *shape), dtype=torch.uint8)
    logits = network(frames)
    assert logits.shape == (3, 5, options.get("num_atoms", 51))
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, by_convolutions(network, frames), rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_two_convolutions():
    network = RainbowNetwork(4, **SMALL).double()
    twin = copy.deepcopy(network)
    frames = torch.randint(0, 256, (3, 3, 13, 21), dtype=torch.uint8)
    direction = torch.randn(3, 4, 7, dtype=torch.float64)
    network(frames).backward(direction)
    by_convolutions(twin, frames).backward(direction)
    for (name, one), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert one.grad.abs().sum() > 0, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_packed_states_are_the_same_states():
    network = RainbowNetwork(6)
    frames = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    packed = FramePatches().pack(frames)
    assert packed.shape == (2, 4, 225, 25)
    assert torch.equal(network(packed), network(frames))
    frames[:, :, 75:], frames[:, :, :, 75:] = 7, 9  # what no block covers is not seen
    assert torch.equal(network(packed), network(frames))


def test_sizes_of_the_paper():
    """Modules, their sizes, and the 1,143,410 parameters that atari.md counts at 18 actions."""
    network = RainbowNetwork(18)
    shapes = {
        name: tuple(getattr(network, name).weight_mu.shape)
        for name in ("value_hidden", "advantage_hidden", "value_out", "advantage_out")
    }
    assert shapes == {
        "value_hidden": (256, 576),
        "advantage_hidden": (256, 576),
        "value_out": (51, 256),
        "advantage_out": (918, 256),
    }
    assert sum(p.numel() for p in network.parameters()) == 1_143_410
    heads = head_names(network)
    assert {name.split(".")[0] for name in heads} == {"value_out", "advantage_out"}
    body = {n: p for n, p in network.named_parameters() if n not in heads}
    assert sum(p.numel() for p in body.values()) == 645_344
    assert sum(p.numel() for n, p in body.items() if "hidden" in n) == 590_848  # 92 %
    for name in ("value_hidden", "value_out"):
        assert getattr(network, name).std == 0.1


def test_patch_layers_start_as_convolutions_do():
    """U(-1/sqrt(fan in), ...), fan in 4 * 25 and 32 * 25."""
    network = RainbowNetwork(2)
    for layer, fan_in in ((network.trunk.first, 100), (network.trunk.second, 800)):
        bound = fan_in**-0.5
        assert bound * 0.98 < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


def test_config_builds_the_same_network():
    network = RainbowNetwork(4, **SMALL, widths=(8, 12), noise_std=0.5)
    twin = RainbowNetwork(**network.config())
    assert twin.config() == network.config()
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    twin.load_state_dict(network.state_dict())
    frames = torch.randint(0, 256, (2, 3, 13, 21), dtype=torch.uint8)
    assert torch.equal(twin.eval()(frames), network.eval()(frames))
    assert (twin.num_actions, twin.num_atoms, twin.hidden, twin.history) == (4, 7, 16, 3)
    assert twin.value_out.std == 0.5


def test_bfloat16_keeps_pixels_exact():
    """Pixels stay integers in the first product, so only weights and sums are rounded: 2^-8 each,
    on outputs whose terms are of size 1."""
    network = RainbowNetwork(3).eval()
    frames = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    cells = network.trunk.bfloat16().cells(FramePatches().pack(frames))
    assert torch.equal(cells.float().view(2, 225, 4, 25).transpose(1, 2).to(torch.uint8),
                       FramePatches().pack(frames))  # fmt: skip


def test_dueling_is_value_plus_centred_advantage():
    value, advantage = torch.randn(2, 1, 5).double(), torch.randn(2, 3, 5).double()
    logits = dueling_logits(value, advantage)
    for n in range(2):
        for z in range(5):
            mean = sum(advantage[n, a, z].item() for a in range(3)) / 3
            for a in range(3):
                expected = value[n, 0, z].item() + advantage[n, a, z].item() - mean
                assert logits[n, a, z].item() == pytest.approx(expected, abs=1e-14)
    for wrong in ((value[:, 0], advantage), (value, advantage[:1]), (value, advantage[0])):
        with pytest.raises(ValueError, match=r"expected \[N, 1, Z\] and \[N, A, Z\]"):
            dueling_logits(*wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_actions": 0}, "num_actions: expected an integer of at least 1, got 0"),
        ({"num_actions": 3.0}, "num_actions: expected an integer"),
        ({"num_atoms": 1}, "num_atoms: expected an integer of at least 2, got 1"),
        ({"hidden": 0}, "hidden: expected an integer of at least 1, got 0"),
        ({"history": True}, "history: expected an integer of at least 1, got True"),
        ({"widths": (32,)}, "widths: expected 2 integers of at least 1"),
        ({"frame_shape": (20, 84)}, "frame_shape: expected at least 25 x 25 pixels"),
        ({"noise_std": -1}, "std: expected a finite number of at least 0, got -1"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RainbowNetwork(**{"num_actions": 4, **options})


@pytest.mark.parametrize(
    "states",
    [
        torch.zeros(1, 4, 84, 84),
        torch.zeros(1, 3, 84, 84, dtype=torch.uint8),
        torch.zeros(4, 84, 84, dtype=torch.uint8),
        torch.zeros(1, 4, 25, 225, dtype=torch.uint8),
        None,
    ],
)
def test_states_of_another_form_are_refused(states):
    with pytest.raises(ValueError, match=r"states: expected uint8 \[n, 4, 84, 84\], or packed"):
        RainbowNetwork(4)(states)
