"""Noisy layers: the formulas, when noise is drawn, and that a kept weight is never a stale one."""

import copy
import math

import pytest
import torch
from torch import nn

from hubpath_fast.tasks.atari import NoisyLinear, RainbowNetwork, draw_noise

F64 = torch.float64


def noisy(inputs=3, outputs=2, **options):
    layer = NoisyLinear(inputs, outputs, dtype=F64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():  # all different, sigma too
            parameter.copy_(torch.randn_like(parameter))
    return layer


def scaled(value):
    return math.copysign(math.sqrt(abs(value)), value)


def by_hand(layer, eps_in, eps_out, x):
    """The module's formula, an output at a time, in plain Python."""
    rows = []
    for sample in x.tolist():
        row = []
        for o, e_out in enumerate(eps_out.tolist()):
            y = layer.bias_mu[o].item() + layer.bias_sigma[o].item() * scaled(e_out)
            for i, e_in in enumerate(eps_in.tolist()):
                noise = scaled(e_out) * scaled(e_in)
                y += sample[i] * (
                    layer.weight_mu[o, i].item() + layer.weight_sigma[o, i].item() * noise
                )
            row.append(y)
        rows.append(row)
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("grad", [True, False])
def test_training_is_the_formula_of_raw_normals(grad):
    layer, x = noisy(), torch.randn(4, 3, dtype=F64)
    eps_in, eps_out = torch.tensor([4.0, -0.25, 0.0]), torch.tensor([-9.0, 2.25])
    layer.set_noise(eps_in, eps_out)
    assert layer.noise_in.tolist() == [2, -0.5, 0]
    assert layer.noise_out.tolist() == [-3, 1.5]
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            layer(x).detach(), by_hand(layer, eps_in, eps_out, x), rtol=1e-12, atol=1e-12
        )


def test_evaluation_is_the_plain_layer():
    layer, x = noisy().eval(), torch.randn(4, 3, dtype=F64)
    layer.set_noise(torch.ones(3), torch.ones(2))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight_mu, layer.bias_mu))
    assert not torch.equal(layer.train()(x), layer.eval()(x))


def test_gradients_are_those_of_the_formula():
    layer, x = noisy(), torch.randn(4, 3, dtype=F64)
    layer.set_noise(torch.randn(3), torch.randn(2))
    g = torch.randn(4, 2, dtype=F64)
    layer(x).backward(g)
    noise = torch.outer(layer.noise_out, layer.noise_in)
    for found, expected in (
        (layer.weight_mu.grad, g.T @ x),
        (layer.weight_sigma.grad, (g.T @ x) * noise),
        (layer.bias_mu.grad, g.sum(0)),
        (layer.bias_sigma.grad, g.sum(0) * layer.noise_out),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_start():
    """mu within 1/sqrt(in) and spread over it; sigma of the weight by in, of the bias by out."""
    layer = NoisyLinear(400, 100, std=0.1)
    for mu in (layer.weight_mu, layer.bias_mu):
        assert mu.detach().abs().max() <= 1 / 20
    # 40,000 draws of U(-1, 1): mean 0 +- 5 sd of 0.577/200, sd 0.577
    assert abs(layer.weight_mu.mean().item() * 20) < 0.015
    assert layer.weight_mu.std().item() * 20 == pytest.approx(1 / math.sqrt(3), abs=0.01)
    assert layer.weight_sigma.unique().tolist() == pytest.approx([0.1 / 20])
    assert layer.bias_sigma.unique().tolist() == pytest.approx([0.1 / 10])
    assert NoisyLinear(4, 9).std == 0.1


def test_draw_noise_is_one_draw_in_module_order():
    """One call of randn, split by layer: first the inputs' normals, then the outputs'."""
    module = nn.Sequential(NoisyLinear(3, 2), nn.ReLU(), nn.Sequential(NoisyLinear(2, 5)))
    draw_noise(module, torch.Generator().manual_seed(4))
    normals = torch.randn(12, generator=torch.Generator().manual_seed(4))
    found = [
        *module[0].noise_in, *module[0].noise_out, *module[2][0].noise_in, *module[2][0].noise_out
    ]  # fmt: skip
    expected = [scaled(value) for value in normals.tolist()]
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-6)


def test_draw_noise_moves_the_generator_only_where_there_is_noise():
    generator, layer = torch.Generator().manual_seed(1), NoisyLinear(3, 3)
    before = generator.get_state()
    draw_noise(nn.Linear(3, 3), generator)
    assert torch.equal(generator.get_state(), before)
    state = torch.get_rng_state()
    draw_noise(layer, generator)
    assert not torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone


def test_a_step_shares_a_draw_and_the_next_takes_another():
    """Acting, s and s' of one step see the same noise, kept or not; the next step's differ."""
    network = RainbowNetwork(3, num_atoms=5, hidden=8, frame_shape=(10, 10), patches=(2, 5))
    states = torch.randint(0, 256, (2, 4, 10, 10), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)

    def step():
        draw_noise(network, generator)
        with torch.no_grad():
            act, following = network(states), network(states)
        return act, following, network(states).detach()

    first, second = step(), step()
    for forwards in (first, second):
        assert torch.equal(forwards[0], forwards[1])
        assert torch.equal(forwards[0], forwards[2])
    assert not torch.equal(first[0], second[0])
    plain = network.eval()(states)
    assert not torch.equal(plain, second[0])
    assert torch.equal(plain, network(states))


def test_the_weight_of_a_step_is_formed_once():
    """Acting, s' and s take one tensor; after gradients have flowed none is kept."""
    layer = noisy()
    layer.set_noise(torch.randn(3), torch.randn(2))
    with torch.no_grad():
        acting, following = (layer.noisy_parameters()[0] for _ in range(2))
    learning = layer.noisy_parameters()[0]
    assert acting.data_ptr() == following.data_ptr() == learning.data_ptr()
    with torch.no_grad():
        assert layer.noisy_parameters()[0].data_ptr() != acting.data_ptr()


@pytest.mark.gpu
def test_a_captured_graph_reads_the_noise_and_parameters_of_now():
    layer, x = noisy().cuda(), torch.randn(4, 3, dtype=F64, device="cuda")
    generator = torch.Generator()
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        draw_noise(layer, generator)
        layer.weight_sigma.add_(1)
        graph.replay()
        weight = layer.weight_mu + layer.weight_sigma * torch.outer(layer.noise_out, layer.noise_in)
        expected = x @ weight.T + layer.bias_mu + layer.bias_sigma * layer.noise_out
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def _forwards(layer, x):
    with torch.no_grad():
        kept = layer(x)
    return kept, layer(x).detach()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.set_noise(torch.randn(3), torch.randn(2)),
        lambda layer: layer.noise_in.mul_(2),
        lambda layer: layer.weight_mu.add_(1),
        lambda layer: layer.weight_sigma.mul_(3),
        lambda layer: layer.bias_mu.add_(1),
        lambda layer: layer.bias_sigma.add_(1),
        lambda layer: setattr(layer, "weight_mu", nn.Parameter(layer.weight_mu + 1)),
        lambda layer: layer.load_state_dict(noisy().state_dict()),
        lambda layer: layer.to(torch.float32).to(F64),  # rounds: new values, same objects
        lambda layer: layer.reset_parameters(),
    ],
)
def test_a_kept_weight_is_formed_anew_after(change):
    layer, x = noisy(), torch.randn(4, 3, dtype=F64)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        after = layer(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, layer(x).detach())


def test_an_update_through_shared_memory_is_seen():
    """Optimizers of one flat tensor change parameters without a new version of theirs."""
    layer, x = noisy(), torch.randn(4, 3, dtype=F64)
    flat = layer.weight_mu.detach().flatten().clone()
    layer.weight_mu.data = flat.view(2, 3)
    kept, learning = _forwards(layer, x)
    assert torch.equal(kept, learning)
    flat.add_(1)
    kept, learning = _forwards(layer, x)
    assert torch.equal(kept, learning)


def test_a_copy_keeps_nothing_of_the_original():
    layer, x = noisy(), torch.randn(4, 3, dtype=F64)
    with torch.no_grad():
        first = layer(x)
        other = copy.deepcopy(layer)
        assert torch.equal(other(x), first)  # the noise comes along
        layer.weight_mu.zero_()
        assert torch.equal(other(x), first)
        other.weight_mu.zero_()
        assert torch.equal(other(x), layer(x))
        assert not torch.equal(other(x), first)


def test_a_copy_at_the_versions_of_the_original_is_no_original():
    """A copy's tensors count their versions anew, and will come to those of the kept weight."""
    layer = noisy()
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.noise_in, layer.noise_out):
            tensor.add_(1).add_(1).add_(1)
        layer.noisy_parameters()
        other = copy.deepcopy(layer)
        for name in ("weight_mu", "weight_sigma", "noise_in", "noise_out"):
            its = getattr(other, name)
            while its._version < getattr(layer, name)._version:
                its.add_(1)
            assert its._version == getattr(layer, name)._version
        found, _ = other.noisy_parameters()
    noise = torch.outer(other.noise_out, other.noise_in)
    expected = (other.weight_mu + other.weight_sigma * noise).detach()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_noise_is_set_in_place_and_not_saved():
    layer = noisy()
    places = layer.noise_in.data_ptr(), layer.noise_out.data_ptr()
    layer.set_noise(torch.randn(3), torch.randn(2))
    draw_noise(layer, torch.Generator())
    assert (layer.noise_in.data_ptr(), layer.noise_out.data_ptr()) == places
    assert set(layer.state_dict()) == {"weight_mu", "weight_sigma", "bias_mu", "bias_sigma"}


def test_bad_arguments_are_named():
    for arguments, message in (
        ((0, 2), "in_features: expected an integer of at least 1, got 0"),
        ((2, 2.0), "out_features: expected an integer of at least 1, got 2.0"),
        ((2, 2, -0.1), "std: expected a finite number of at least 0, got -0.1"),
        ((2, 2, math.nan), "std: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            NoisyLinear(*arguments)
    layer = NoisyLinear(3, 2)
    with pytest.raises(ValueError, match=r"eps_in: expected raw normals \[3\], got \[2\]"):
        layer.set_noise(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"eps_out: expected raw normals \[2\], got \[1, 2\]"):
        layer.set_noise(torch.zeros(3), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"generator: expected a torch\.Generator on the CPU"):
        draw_noise(layer, None)
