"""Zoo-Tuning and Knowledge Flow as policies, against their formulas written out in float64.

In float64 two orders of computation differ by roundings of some 1e-15 a term, over fewer than 1e4
terms: relative errors stay far below CLOSE.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from hubpath_fast.baselines.knowledge_flow import LOGIT_TRAVEL
from hubpath_fast.model.heads import head_names
from hubpath_fast.tasks.atari import RainbowNetwork, categorical_loss, draw_noise
from hubpath_fast.tasks.atari.distribution import make_atoms
from hubpath_fast.tasks.atari.network import PatchLinear
from hubpath_fast.tasks.atari.noisy import NoisyLinear
from hubpath_fast.tasks.atari.policy import Policy
from hubpath_fast.tasks.atari.rivals import (
    KnowledgeFlowPolicy,
    MixedNoisy,
    MixedPatches,
    ZooTuningPolicy,
)

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


# Zoo-Tuning


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


# Knowledge Flow


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


def written_out(policy, networks, student, states):
    """Logits of the helped student, layer by layer, in training mode."""
    gain = LOGIT_TRAVEL / (100 * policy.lr)
    exponents = (policy.flow.start + gain * policy.flow.travel).exp()
    weights = exponents / exponents.sum(1, keepdim=True)

    def depth(level, own, theirs):
        total = weights[level, 0] * own
        for t, outputs in enumerate(theirs):
            matrix = policy.flow.projections[level][t].weight
            total = total + weights[level, 1 + t] * torch.einsum("oi,...i->...o", matrix, outputs)
        return total

    x = states.double() / 255
    x = student.patches.pack(x).transpose(1, 2).flatten(2)
    own, theirs = x, [x] * len(networks)
    for level, name in enumerate(("first", "second")):
        apply = [getattr(net.trunk, name) for net in (student, *networks)]
        outputs = [
            F.relu(F.linear(h, layer.weight, layer.bias))
            for h, layer in zip((own, *theirs), apply, strict=True)
        ]
        own, theirs = depth(level, outputs[0], outputs[1:]), outputs[1:]
        reshape = student.trunk.by_block if name == "first" else lambda h: h.flatten(1)
        own, theirs = reshape(own), [reshape(h) for h in theirs]
    hidden = []
    for level, name in ((2, "value_hidden"), (3, "advantage_hidden")):
        mine = F.relu(plain_noisy(getattr(student, name), own))
        taught = [
            F.relu(F.linear(h, getattr(net, name).weight_mu, getattr(net, name).bias_mu))
            for h, net in zip(theirs, networks, strict=True)
        ]
        hidden.append(depth(level, mine, taught))
    return head(student, *hidden), weights


@pytest.mark.parametrize("count", [1, 3])
def test_the_helped_student_is_the_formula_layer_by_layer(count):
    policy = moved_flow(count)
    states, *_ = batch()
    expected, weights = written_out(policy, sources(count), policy.student, states)
    torch.testing.assert_close(policy(states), expected, **CLOSE)
    torch.testing.assert_close(policy.flow.weights(), weights, **CLOSE)


def test_the_student_is_alone_in_evaluation():
    policy = moved_flow().eval()
    for part in (*policy.teachers.modules(), *policy.flow.projections.modules()):
        part.register_forward_hook(lambda *_: pytest.fail("a teacher ran"))
    states, *_ = batch()
    assert torch.equal(policy(states), sources()[0].eval()(states))


def some_update(policy):
    with torch.no_grad():
        for name, parameter in policy.flow.named_parameters():
            scale = 0.05 / policy.flow.gain if name == "travel" else 0.05
            parameter.add_(scale * torch.randn_like(parameter))


def test_losses_by_hand():
    """The first call has no change to see; later ones see the update before them, and no more."""
    policy = moved_flow(dependency=0.75, keep=0.4)
    states, actions, target, weights = batch()
    first = policy.losses(states, actions, target, weights)
    assert abs(first.terms["keep"]) < 1e-12
    some_update(policy)
    policy.losses(states, actions, target, weights)
    before = policy(states).detach()
    some_update(policy)
    found = policy.losses(states, actions, target, weights)

    now, w = written_out(policy, sources(), policy.student, states)
    task = categorical_loss(now, actions, target)
    torch.testing.assert_close(found.task, task, **CLOSE)
    dependency = -w[:, 0].log().sum()
    keep = 0
    for n in range(N):
        for a in range(A):
            p, q = before[n, a].softmax(0), now[n, a].softmax(0)
            keep = keep + sum(p[z] * (p[z] / q[z]).log() for z in range(Z)) / (N * A)
    assert keep > 1e-3
    rise = 0.25 / 0.5
    total = (weights * task).mean() + 0.75 * rise * dependency + 0.4 * keep
    torch.testing.assert_close(found.total, total, **CLOSE)
    torch.testing.assert_close(found.terms["dependency"], dependency, **CLOSE)
    torch.testing.assert_close(found.terms["keep"], keep, **CLOSE)
    torch.testing.assert_close(found.terms["own"], w[:, 0].log().mean().exp(), **CLOSE)
    assert not any(value.requires_grad for value in (found.task, *found.terms.values()))

    # Gradients: of the written-out loss, but for the gain on what is learned in the logits' place.
    wanted = torch.autograd.grad(total, list(policy.flow.parameters()))
    found.total.backward()
    gain = LOGIT_TRAVEL / (100 * policy.lr)
    for (name, parameter), expected in zip(policy.flow.named_parameters(), wanted, strict=True):
        expected = expected / gain if name == "travel" else expected
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-9, msg=name)
    assert all(p.grad is None for p in policy.teachers.parameters())


def test_new_noise_alone_is_no_change():
    """The earlier parameters run under the noise of now."""
    policy = moved_flow()
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        draw_noise(policy, generator)
        assert abs(policy.losses(*batch()).terms["keep"]) < 1e-12
    with torch.no_grad():
        policy.student.value_out.weight_mu.add_(
            torch.randn_like(policy.student.value_out.weight_mu)
        )
    assert policy.losses(*batch()).terms["keep"] > 1e-3


def test_the_weights_go_to_the_student_over_a_run_of_any_length():
    """By Adam at the rate of all; in the first half teachers help, in the end hardly any does.

    The dependency is all that pulls here: its gradient has one sign, so that a logit moves by
    LOGIT_TRAVEL in a run, less what Adam's start takes."""
    for steps in (20, 80):
        policy = KnowledgeFlowPolicy(sources(), atoms(), lr=1e-3, keep=0)
        assert policy.flow.weights()[:, 0].tolist() == pytest.approx([0.5] * 4)
        assert policy.flow.weights()[:, 1:].flatten().tolist() == pytest.approx([0.25] * 8)
        optimizer = torch.optim.Adam([policy.flow.travel], 1e-3, eps=1.5e-4)
        states, actions, target, weights = batch()
        rises = []
        for step in range(steps):
            policy.set_progress(step, steps)
            rises.append(policy.rise.item())
            losses = policy.losses(states, actions, target, 0 * weights)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
        quarter = steps // 4
        assert [rises[0], rises[quarter], rises[2 * quarter], rises[-1]] == [0, 0.5, 1, 1]
        assert (policy.flow.weights()[:, 0] > 0.995).all()


def test_noise_is_drawn_for_the_student_alone():
    policy = moved_flow(3)
    layers = [layer for layer in policy.modules() if isinstance(layer, NoisyLinear)]
    assert len(layers) == 4
    assert {id(layer) for layer in layers} < {id(layer) for layer in policy.student.modules()}


# Both


@pytest.fixture(params=["zoo", "flow"])
def policy(request):
    return moved_zoo() if request.param == "zoo" else moved_flow()


def test_they_are_policies(policy):
    assert isinstance(policy, Policy)
    assert policy.num_actions == A
    assert policy.atoms.tolist() == [-2, -1, 0, 1, 2]
    states, actions, target, weights = batch()
    logits = policy(states)
    assert logits.shape == (N, A, Z)
    assert torch.equal(policy(policy_states(policy, states)), logits)
    found = policy.losses(states, actions, target, weights)
    assert found.task.shape == (N,)
    torch.testing.assert_close(found.task, categorical_loss(logits, actions, target), **CLOSE)


def policy_states(policy, states):
    network = getattr(policy, "student", None) or policy.network
    return network.patches.pack(states)


def test_a_step_shares_its_noise_and_the_next_has_another(policy):
    states, _actions, _target, _weights = batch()
    generator = torch.Generator().manual_seed(9)
    steps = []
    for _ in range(2):
        draw_noise(policy, generator)
        with torch.no_grad():
            acting = policy(states)
            following = policy(states)
        learning = policy(states).detach()
        assert torch.equal(acting, following)
        assert torch.equal(acting, learning)
        steps.append(acting)
    assert not torch.allclose(*steps)


def test_a_target_is_a_copy_with_noise_of_its_own(policy):
    states, *_ = batch()
    with torch.no_grad():
        expected = policy(states)
        target = copy.deepcopy(policy).requires_grad_(False)
        assert torch.equal(target(states), expected)
        draw_noise(target, torch.Generator().manual_seed(8))
        assert torch.equal(policy(states), expected)
        assert not torch.allclose(target(states), expected)
        for parameter in policy.parameters():
            parameter.fill_(0.1)
        draw_noise(target, torch.Generator().manual_seed(3))
        assert torch.equal(target(states), expected)


def test_a_state_dict_is_all_that_another_needs(policy):
    """Made of other networks, as a resumed run makes it, it then goes on alike."""
    torch.manual_seed(77)
    strangers = [RainbowNetwork(A, **SIZES).double() for _ in range(2)]
    other = type(policy)(strangers, atoms())
    if isinstance(other, KnowledgeFlowPolicy):
        other.set_progress(1, 10)
    other.load_state_dict(policy.state_dict())
    states = {name: value.data_ptr() for name, value in policy.state_dict().items()}
    assert len(set(states.values())) == len(states)  # nothing is stored twice
    results = []
    for one in (policy, other):
        draw_noise(one, torch.Generator().manual_seed(8))
        found = one.losses(*batch())
        found.total.backward()
        results.append(
            [found.total, found.task, *(p.grad for p in one.parameters() if p.requires_grad)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sources_stay_as_they_are(policy):
    pair = sources()
    before = [copy.deepcopy(network.state_dict()) for network in pair]
    made = type(policy)(pair, atoms())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    for network, state in zip(pair, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 8}, "the same hidden in all, but it is 6 in the first and 8 in number 2"),
        ({"num_atoms": 7}, "num_atoms in all, but it is 5 in the first and 7 in number 2"),
        ({"widths": (4, 8)}, r"it is \[4, 7\] in the first and \[4, 8\] in number 2"),
        ({"frame_shape": (12, 12)}, r"frame_shape in all, but it is \[12, 13\] in the first"),
    ],
)
@pytest.mark.parametrize("kind", [ZooTuningPolicy, KnowledgeFlowPolicy])
def test_sources_of_another_architecture_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind([*sources(1), *sources(1, **changes)], atoms())
    kind([*sources(1), *sources(1, noise_std=0.5)], atoms())  # says nothing of what was learned


def test_too_few_sources_and_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="Zoo-Tuning needs at least 2, got 1"):
        ZooTuningPolicy(sources(1), atoms())
    with pytest.raises(ValueError, match="Knowledge Flow needs at least 1, got 0"):
        KnowledgeFlowPolicy([], atoms())
    for name, value in (("keep", -1), ("dependency", float("inf")), ("lr", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected a number"):
            KnowledgeFlowPolicy(sources(), atoms(), **{name: value})
    with pytest.raises(ValueError, match=r"atoms: expected \[5\] as the networks, got \[7\]"):
        KnowledgeFlowPolicy(sources(), torch.zeros(7))
    with pytest.raises(ValueError, match=r"atoms: expected \[5\] as the networks, got \[7\]"):
        ZooTuningPolicy(sources(), torch.zeros(7))
