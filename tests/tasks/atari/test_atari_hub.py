"""The hub as a policy, in float64, against the formulas written out."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hubpath_fast.tasks.atari.distribution import double_q_target, make_atoms
from hubpath_fast.tasks.atari.heads import with_head
from hubpath_fast.tasks.atari.hub import HubPolicy, StateGenerator
from hubpath_fast.tasks.atari.learn import Batch, Learner
from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.atari.noisy import draw_noise
from hubpath_fast.tasks.atari.policy import Policy
from hubpath_fast.tasks.atari.settings import AtariSettings

CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides: sums of a few dozen products
A, Z, N, SIDE = 3, 5, 6, 8
SMALL = {
    "num_atoms": Z, "hidden": 7, "history": 2, "frame_shape": (SIDE, SIDE), "patches": (2, 2),
    "widths": (4, 6),
}  # fmt: skip


def network(num_actions=A, **changes):
    return RainbowNetwork(num_actions, **SMALL | changes)


def policy(count=2, k=2, seed=0, **options):
    """In float64, with a router that has preferences and an aggregator that mixes."""
    torch.manual_seed(seed)
    made = HubPolicy([network() for _ in range(count)], make_atoms(Z, -2, 2), k, **options).double()
    # The formula below reads these from the model.
    assert (made.hub.k, made.hub.renormalize) == (k, options.get("renormalize", False))
    generator, aggregator = made.hub.generator, made.hub.aggregator
    for parameter in (generator.clean.weight, generator.noise.weight):
        torch.nn.init.normal_(parameter)
    aggregator.weight.data += 0.2 * torch.randn_like(aggregator.weight)
    return made


def batch(seed=1, n=N):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(0, 256, (2, n, 2, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    actions = torch.randint(0, A, (n,), generator=generator)
    target = torch.rand(n, Z, dtype=torch.float64, generator=generator)
    weights = torch.rand(n, dtype=torch.float64, generator=generator)
    return states[0], states[1], actions, target / target.sum(1, keepdim=True), weights


def routes(made, states, eps=None):
    """p [n, M] and the weights [n, M] of the kept: a loop over states."""
    hub, packed = made.hub, made.hub.experts[0].packed(states)
    generator = hub.generator
    means = packed.double().mean(-1).transpose(1, 2).flatten(1) / 255  # by cell, then frame
    hidden = (means @ generator.hidden.weight.T + generator.hidden.bias).clamp_min(0)
    clean = hidden @ generator.clean.weight.T + generator.clean.bias
    noise = hidden @ generator.noise.weight.T + generator.noise.bias
    z = clean if eps is None else clean + eps * torch.log1p(noise.exp())
    p = z.exp() / z.exp().sum(1, keepdim=True)
    kept = torch.zeros_like(p)
    for n, row in enumerate(p.detach()):
        for i in sorted(range(len(row)), key=lambda i: -row[i])[: hub.k]:
            kept[n, i] = 1
    weights = p * kept
    return p, weights / weights.sum(1, keepdim=True) if hub.renormalize else weights


def formula(made, states, eps=None):
    """The combined logits [n, A, Z], those of each expert [n, M, A, Z], p and weights."""
    p, weights = routes(made, states, eps)
    outputs = torch.stack([expert(states) for expert in made.hub.experts], 1)
    matrix = made.hub.aggregator.weight.view(A, -1, A)
    combined = torch.einsum("bia,ni,niaz->nbz", matrix, weights, outputs)
    return combined + made.hub.aggregator.bias[:, None], outputs, p, weights


CASES = [(2, 2, False), (2, 1, False), (3, 1, True), (3, 2, False), (3, 3, False), (1, 1, False),
         (3, 2, True)]  # fmt: skip


@pytest.mark.parametrize(("count", "k", "renormalize"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_are_the_formula(count, k, renormalize, training):
    made = policy(count, k, renormalize=renormalize).train(training)
    states, *_ = batch()
    expected, _, _, weights = formula(made, states)
    rng = torch.get_rng_state()
    torch.testing.assert_close(made(states), expected, **CLOSE)
    torch.testing.assert_close(made.acting_logits(states), expected, **CLOSE)
    torch.testing.assert_close(made.expert_weights(states), weights, **CLOSE)
    assert torch.equal(torch.get_rng_state(), rng)  # no pathway noise in any of them
    packed = made.hub.experts[0].packed(states)
    assert torch.equal(made(packed), made(states))
    assert isinstance(made, Policy)


@pytest.mark.parametrize(("count", "k", "renormalize"), CASES)
def test_losses_and_gradients_are_the_formula(count, k, renormalize):
    made = policy(count, k, renormalize=renormalize, explore=0.7)
    twin = copy.deepcopy(made)
    states, _, actions, target, weights = batch()
    torch.manual_seed(3)
    losses = made.losses(states, actions, target, weights)
    torch.manual_seed(3)
    eps = torch.randn(N, count, dtype=torch.float64)
    combined, outputs, p, kept = formula(twin, states, eps)

    def cross_entropy(logits):
        return -(target * F.log_softmax(logits[range(N), actions], -1)).sum(-1)

    task = cross_entropy(combined)
    pbar = p.mean(0)
    explore = (pbar * pbar.log()).sum()
    exploit = sum(
        weights[n] * cross_entropy(outputs[:, i])[n]
        for n in range(N)
        for i in range(count)
        if kept[n, i] > 0
    )
    total = (weights * task).mean() + 0.7 * explore + exploit / N
    torch.testing.assert_close(losses.total, total, **CLOSE)
    torch.testing.assert_close(losses.task, task, **CLOSE)
    assert not losses.task.requires_grad
    torch.testing.assert_close(losses.terms["explore"], explore, **CLOSE)
    torch.testing.assert_close(losses.terms["exploit"], exploit / N, **CLOSE)
    torch.testing.assert_close(losses.terms["weights"], kept.mean(0), **CLOSE)
    share = (kept > 0).double().mean(0)
    torch.testing.assert_close(losses.terms["share"].double(), share, rtol=1e-6, atol=0)  # float32
    losses.total.backward()
    total.backward()
    for (name, ours), truth in zip(made.named_parameters(), twin.parameters(), strict=True):
        if ours.grad is None:  # of an expert that no state asks
            assert truth.grad is None or not truth.grad.any(), name
        else:
            torch.testing.assert_close(ours.grad, truth.grad, **CLOSE, msg=name)


@pytest.mark.parametrize("term", ["explore", "exploit"])
def test_each_loss_reaches_only_its_part(term, monkeypatch):
    made = policy(3, 2)
    states, _, *rest = batch()
    kept = []
    forward = made.criterion.forward
    monkeypatch.setattr(
        made.criterion, "forward", lambda *args: kept.append(forward(*args)) or kept[-1]
    )
    made.losses(states, *rest)
    getattr(kept[0], term).backward()
    reached = {
        name
        for name, module in made.hub.named_children()
        if any(p.grad is not None and p.grad.any() for p in module.parameters())
    }
    assert reached == {"generator" if term == "explore" else "experts"}


def test_it_starts_as_the_mean_of_its_networks():
    networks = [network() for _ in range(3)]
    made = HubPolicy(networks, make_atoms(Z, -2, 2), 3)
    states, *_ = batch()
    expected = sum(one(states) for one in networks) / 3
    torch.testing.assert_close(made(states), expected)
    assert made.expert_weights(states).tolist() == [[pytest.approx(1 / 3)] * 3] * N


def test_the_papers_hub_has_an_aggregator_of_666_parameters_and_a_small_generator():
    networks = [RainbowNetwork(18) for _ in range(2)]
    made = HubPolicy(networks, make_atoms(51, -10, 10))

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(made.hub.aggregator) == 666
    assert count(made.hub.generator) == 900 * 64 + 64 + 2 * (64 * 2 + 2)
    assert count(made.hub.generator) < count(networks[0]) / 15
    assert made.hub.k == 2


@pytest.mark.parametrize(
    ("where", "noisy"),
    [("update", set()), ("act", {"acting_logits"}), ("all", {"acting_logits", "forward"})],
)
def test_pathway_noise_is_where_it_is_asked_for(where, noisy):
    made = policy(pathway_noise=where)
    states, _, *rest = batch()
    for name in ("acting_logits", "forward", "losses"):
        function = getattr(made, name)
        more = rest if name == "losses" else ()
        first, second = (function(states, *more) for _ in range(2))
        if name == "losses":
            assert not torch.equal(first.task, second.task)
        else:
            assert torch.equal(first, second) == (name not in noisy), name
    made.eval()
    for function in (made.acting_logits, made):
        assert torch.equal(function(states), function(states))


@pytest.mark.parametrize("where", ["update", "act"])
def test_who_learns_acts_by_the_acting_logits(where):
    settings = AtariSettings(game="any", method="scratch", v_min=-2.0, v_max=2.0, atoms=Z)
    learner = Learner(policy(pathway_noise=where), settings, torch.Generator().manual_seed(0))
    state = batch(n=1)[0]
    learner.policy.hub.generator.noise.bias.data.fill_(30.0)  # either expert, at random
    for i in range(2):  # which action each takes is plain
        learner.policy.hub.experts[i].advantage_out.bias_mu.data.view(A, Z)[i, -1] += 100.0
    actions = {learner.act(state) for _ in range(60)}
    assert len(actions) == (2 if where == "act" else 1)


def test_networks_are_noisy_in_training_mode_whatever_the_routing():
    made = policy()
    states, *_ = batch()
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        draw_noise(made, generator)
        found.append(made(states))
        torch.testing.assert_close(found[-1], formula(made, states)[0], **CLOSE)
    assert not torch.allclose(*found)
    weights = made.expert_weights(states)
    assert torch.equal(weights, made.eval().expert_weights(states))


def test_the_target_hub_routes_by_its_own_generator():
    """Until it is copied, nothing that the online hub learns moves the target's distribution."""
    settings = AtariSettings(game="any", method="scratch", v_min=-2.0, v_max=2.0, atoms=Z)
    learner = Learner(policy(3, 2), settings, torch.Generator().manual_seed(0))
    states, following, actions, _, weights = batch()
    before = learner.target(following)
    own = learner.target.hub.generator.clean.weight.clone()
    returns, discounts = torch.rand(2, N, dtype=torch.float64)
    for _ in range(3):
        learner.compute(Batch(states, actions, returns, discounts, following, weights))
    assert torch.equal(learner.target(following), before)
    assert torch.equal(learner.target.hub.generator.clean.weight, own)
    assert not torch.equal(learner.policy.hub.generator.clean.weight, own)
    learner.copy_to_target()
    with torch.no_grad():  # as the target is: layers may round in another way for a gradient
        torch.testing.assert_close(learner.target(following), learner.policy(following), **CLOSE)


def test_double_q_chooses_by_the_combined_logits_and_values_by_the_target_hub():
    made, target = policy(seed=0), policy(seed=5)
    _, following, *_ = batch()
    returns, discounts = torch.rand(2, N, dtype=torch.float64)
    found = double_q_target(made(following), target(following), returns, discounts, -2, 2)
    chosen = (F.softmax(formula(made, following)[0], -1) @ made.atoms).argmax(1)
    probabilities = F.softmax(formula(target, following)[0], -1)[range(N), chosen]
    expected = torch.zeros(N, Z, dtype=torch.float64)
    for n in range(N):
        for z, mass in zip(made.atoms, probabilities[n], strict=True):
            place = (returns[n] + discounts[n] * z).clamp(-2, 2) + 2  # atoms are 1 apart
            below = int(place)
            expected[n, below] += mass * (below + 1 - place)
            if below + 1 < Z:
                expected[n, below + 1] += mass * (place - below)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_it_is_copied_and_stored_as_any_module(tmp_path):
    made, other = policy(3, 2, seed=0), policy(3, 2, seed=9)
    states, _, *rest = batch()
    torch.save(made.state_dict(), tmp_path / "policy.pt")
    other.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    for one in (other, copy.deepcopy(made)):
        assert torch.equal(one.eval()(states), made.eval()(states))
        torch.manual_seed(2)
        found = one.train().losses(states, *rest).total
        assert found.isfinite()


def test_bodies_are_kept_under_new_heads():
    sources = [network(5), network(4)]
    made = HubPolicy([with_head(source, A) for source in sources], make_atoms(Z, -2, 2))
    for expert, source in zip(made.hub.experts, sources, strict=True):
        for name in ("trunk", "value_hidden", "advantage_hidden"):
            mine, theirs = (getattr(n, name).state_dict() for n in (expert, source))
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    kept = [with_head(network(A), A, keep=True) for _ in range(2)]
    assert HubPolicy(kept, make_atoms(Z, -2, 2)).num_actions == A
    with pytest.raises(ValueError, match="5 actions cannot keep its head in a game of 3"):
        with_head(sources[0], A, keep=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (list, "networks: a hub needs at least 1, got 0"),
        (lambda: [network(3), network(4)], "same num_actions .* 3 in the first and 4 in number 2"),
        (lambda: [network(), network(num_atoms=7)], "same num_atoms"),
        (lambda: [network(), network(history=3)], "same history"),
        (lambda: [network(), network(frame_shape=(12, 12))], "same frame_shape"),
        (lambda: [network(num_atoms=7)] * 2, r"atoms: expected \[7\] .*got \[5\]"),
    ],
)
def test_networks_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        HubPolicy(make(), make_atoms(Z, -2, 2))


def test_other_arguments_that_are_wrong_are_refused():
    networks, atoms = [network(), network()], make_atoms(Z, -2, 2)
    with pytest.raises(ValueError, match=r"k: .*1\.\.2.*got 3"):
        HubPolicy(networks, atoms, 3)
    with pytest.raises(ValueError, match="pathway_noise: expected one of update, act, all, got"):
        HubPolicy(networks, atoms, pathway_noise="never")
    with pytest.raises(ValueError, match=r"explore: .*-1"):
        HubPolicy(networks, atoms, explore=-1)
    states, _, *rest = batch()
    with pytest.raises(ValueError, match="losses: the policy is in evaluation mode"):
        HubPolicy(networks, atoms).eval().losses(states, *rest)
    with pytest.raises(ValueError, match=r"states: expected uint8 \[n, 2, 8, 8\]"):
        HubPolicy(networks, atoms)(states[:, :1])


def test_different_widths_may_be_one_hub():
    made = HubPolicy([network(), network(widths=(3, 5), hidden=4)], make_atoms(Z, -2, 2))
    assert made(batch()[0]).shape == (N, A, Z)


def test_the_generator_sees_the_mean_of_each_cell():
    patches = network().patches
    cells, pixels = patches.shape
    generator = StateGenerator(2, 2, patches, noise_init=-1.0).double()
    clean, noise = generator(torch.zeros(3, cells, 2 * pixels, dtype=torch.float64))
    assert torch.equal(clean, torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(noise, torch.full((3, 2), -1.0, dtype=torch.float64))
    torch.nn.init.normal_(generator.clean.weight)
    states = torch.randint(0, 256, (3, 2, cells, pixels), dtype=torch.uint8)

    def scores(states):
        return generator(network().double().cells(states))[0]

    assert torch.equal(scores(states), scores(states.flip(3)))  # other pixels, of the same cells
    for other in (1, 2):
        assert not torch.allclose(scores(states), scores(states.flip(other)))


def test_numbers_are_made_of_bytes_once():
    """What a network makes of states it takes as it is, but of no other shape."""
    one, states = network().double(), batch()[0]
    cells = one.cells(states)
    assert one.cells(cells) is cells
    assert torch.equal(one(cells), one(states))
    with pytest.raises(ValueError, match=r"states: expected uint8 .*got torch.float64"):
        one(cells[:, 1:])
