"""Zoo-Tuning as a policy, against its formula written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from support.rivals import (
    CLOSE,
    F64,
    LAYERS,
    atoms,
    batch,
    head,
    mixed,
    moved_zoo,
    plain_noisy,
    sources,
)

from hubpath_fast.model.heads import head_names
from hubpath_fast.tasks.atari import RainbowNetwork, draw_noise
from hubpath_fast.tasks.atari.distribution import make_atoms
from hubpath_fast.tasks.atari.network import PatchLinear
from hubpath_fast.tasks.atari.noisy import NoisyLinear
from hubpath_fast.tasks.atari.rivals import (
    MixedNoisy,
    MixedPatches,
    ZooTuningPolicy,
)


def test_every_layer_of_the_body_is_mixed_and_92_percent_of_it_is_noisy():
    """Parameters of the true network: all of the sources' bodies are there, none is averaged."""
    pair = [RainbowNetwork(18) for _ in range(2)]
    policy = ZooTuningPolicy(pair, make_atoms(51, -10, 10))
    kinds = {name: type(layer) for name, layer in mixed(policy).items()}
    assert kinds == dict(zip(LAYERS, [MixedPatches] * 2 + [MixedNoisy] * 2, strict=True))
    new = {id(p) for layer in mixed(policy).values() for p in layer.router_parameters()}
    heads = head_names(policy.network)
    body = {
        name: p
        for name, p in policy.network.named_parameters()
        if name not in heads and id(p) not in new
    }
    assert sum(p.numel() for p in body.values()) == 2 * 645_344
    noisy = sum(p.numel() for name, p in body.items() if ".noisy." in name)
    assert noisy == 2 * 590_848
    assert pytest.approx(0.92, abs=0.005) == 590_848 / 645_344
    for name in ("value_out", "advantage_out"):
        for key, value in pair[0].get_submodule(name).state_dict().items():
            assert torch.equal(policy.network.get_submodule(name).state_dict()[key], value)
    for m, source in enumerate(pair):
        kernels = policy.network.value_hidden.noisy.weight_sigma.view(2, 256, 576)
        assert torch.equal(kernels[m], source.value_hidden.weight_sigma)


@pytest.mark.parametrize("training", [True, False])
def test_a_gate_that_picks_one_source_gives_its_body(training):
    pair = sources()
    policy = ZooTuningPolicy(pair, atoms()).train(training)
    draw_noise(policy, torch.Generator().manual_seed(3))
    for layer in mixed(policy).values():
        torch.nn.init.zeros_(layer.gate[2].weight)
        layer.gate[2].bias.data = torch.tensor([-1e4, 1e4], dtype=F64)
    states, *_ = batch()
    one, network = pair[1].eval(), policy.network
    features = one.trunk.features(one.cells(states))
    hidden = [
        plain_noisy(one.get_submodule(name), features, network.get_submodule(name).noisy, training)
        for name in LAYERS[2:]
    ]
    expected = head(network, *(h.relu() for h in hidden), training=training)
    torch.testing.assert_close(policy(states), expected, **CLOSE)
    if not training:  # with its own head it would be that policy
        torch.testing.assert_close(
            head(one, *(h.relu() for h in hidden), training=False), one(states), **CLOSE
        )


def plain_parameters(own, layer, training):
    """Weight and bias of a source's layer, under the noise of the mixed one."""
    if not isinstance(own, NoisyLinear):
        return own.weight, own.bias
    noise = layer.noisy
    eps = torch.outer(noise.noise_out, noise.noise_in) * training
    bias = own.bias_mu + own.bias_sigma * noise.noise_out * training
    return own.weight_mu + own.weight_sigma * eps, bias


@pytest.mark.parametrize("training", [True, False])
def test_mixing_is_the_formula_for_each_state(training):
    """A state at a time: its own kernels in each layer, mu and sigma by the same coefficients."""
    pair, policy = sources(), moved_zoo().train(training)
    network, (states, *_) = policy.network, batch()
    rows = []
    for state in states:
        x, hidden = network.cells(state[None])[0] / 255, []  # [cells, in]
        for name in LAYERS:
            layer = network.get_submodule(name)
            pooled = x.mean(0) if x.dim() == 2 else x
            a = torch.sigmoid(layer.gate[2](F.relu(layer.gate[0](pooled))))
            kernel, bias = 0, 0
            for m, source in enumerate(pair):
                weight, offset = plain_parameters(source.get_submodule(name), layer, training)
                kernel = kernel + a[m] * layer.alignment[m] @ weight
                bias = bias + a[m] * offset
            y = F.relu(F.linear(x, kernel, bias))
            if name == "trunk.first":
                x = network.trunk.by_block(y[None])[0]
            elif name == "trunk.second":
                x = y.flatten()
            else:
                hidden.append(y[None])
        rows.append(head(network, *hidden, training=training))
    torch.testing.assert_close(policy(states), torch.cat(rows), **CLOSE)


def test_a_layer_that_is_no_plain_one_is_refused_by_the_name_of_what_is():
    class Other(PatchLinear):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="of plain PatchLinear layers, and does not know what a O"):
        MixedPatches([Other(2, 3)] * 2)


def test_zoo_gradients_reach_all_there_is():
    policy = moved_zoo()
    states, actions, target, weights = batch()
    losses = policy.losses(states, actions, target, weights)
    losses.total.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    layer = policy.network.advantage_hidden.noisy
    for part in (layer.weight_mu.grad, layer.weight_sigma.grad):
        assert (part.view(2, -1).abs().amax(1) > 0).all()  # of both sources
