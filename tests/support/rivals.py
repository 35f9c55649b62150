"""Zoo-Tuning and Knowledge Flow as small policies in float64, away from where they start.

In float64 two orders of computation differ by roundings of some 1e-15 a term, over fewer than 1e4
terms: relative errors stay far below CLOSE.
"""

import torch
import torch.nn.functional as F

from hubpath_fast.tasks.atari import RainbowNetwork, draw_noise
from hubpath_fast.tasks.atari.distribution import make_atoms
from hubpath_fast.tasks.atari.rivals import KnowledgeFlowPolicy, ZooTuningPolicy

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
F64 = torch.float64
SMALL = {"num_atoms": 5, "hidden": 6, "history": 2, "frame_shape": (12, 13), "patches": (2, 3)}
SIZES = {"widths": (4, 7), **SMALL}
LAYERS = ("trunk.first", "trunk.second", "value_hidden", "advantage_hidden")
N, A, Z = 3, 4, 5


def sources(count=2, **changes):
    torch.manual_seed(0)
    return [RainbowNetwork(A, **{**SIZES, **changes}).double() for _ in range(count)]


def atoms():
    return make_atoms(Z, -2, 2, dtype=F64)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 256, (N, 2, 12, 13), dtype=torch.uint8, generator=generator),
        torch.randint(0, A, (N,), generator=generator),
        torch.randn(N, Z, dtype=F64, generator=generator).softmax(1),
        torch.rand(N, dtype=F64, generator=generator),
    )


def plain_noisy(layer, x, noise=None, training=True):
    """A noisy layer written out, under another layer's noise if given."""
    noise = noise or layer
    eps = torch.outer(noise.noise_out, noise.noise_in) * training
    weight = layer.weight_mu + layer.weight_sigma * eps
    return F.linear(x, weight, layer.bias_mu + layer.bias_sigma * noise.noise_out * training)


def head(network, value, advantage, noise=None, training=True):
    noise = noise or network
    value = plain_noisy(network.value_out, value, noise.value_out, training)
    advantage = plain_noisy(network.advantage_out, advantage, noise.advantage_out, training)
    advantage = advantage.view(-1, A, Z)
    return value[:, None] + advantage - advantage.mean(1, keepdim=True)


def moved_zoo():
    """Away from its start: other alignments, gates that tell states apart, some noise."""
    policy = ZooTuningPolicy(sources(), atoms())
    with torch.no_grad():
        for layer in mixed(policy).values():
            layer.gate[0].weight.normal_()
            layer.gate[2].weight.normal_()
            layer.alignment.add_(0.3 * torch.randn_like(layer.alignment))
    draw_noise(policy, torch.Generator().manual_seed(3))
    return policy


def mixed(policy):
    return {name: policy.network.get_submodule(name) for name in LAYERS}


def moved_flow(count=2, **options):
    policy = KnowledgeFlowPolicy(sources(count), atoms(), **options)
    policy.set_progress(25, 100)  # half of RISE: exact in float32
    with torch.no_grad():
        policy.flow.travel.normal_(std=1 / policy.flow.gain.item())
        for projection in policy.flow.projections.parameters():
            projection.normal_(std=0.5)
        policy._remember()
    draw_noise(policy, torch.Generator().manual_seed(3))
    return policy
