"""What both rivals are: policies, whose noise, copies and states are as others'."""

import copy

import pytest
import torch
from support.rivals import (
    CLOSE,
    SIZES,
    A,
    N,
    Z,
    atoms,
    batch,
    moved_flow,
    moved_zoo,
    sources,
)

from hubpath_fast.tasks.atari import RainbowNetwork, categorical_loss, draw_noise
from hubpath_fast.tasks.atari.policy import Policy
from hubpath_fast.tasks.atari.rivals import (
    KnowledgeFlowPolicy,
    ZooTuningPolicy,
)


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
