"""One update: its target, its gradient, its noise and its step, against what is written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from hubpath_fast.tasks.atari.distribution import make_atoms
from hubpath_fast.tasks.atari.learn import Batch, Learner
from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.atari.policy import Policy, SinglePolicy
from hubpath_fast.tasks.atari.settings import AtariSettings

ATOMS = make_atoms(5, -2.0, 2.0, dtype=torch.float64)
SMALL = {"num_actions": 3, "num_atoms": 5, "hidden": 6, "history": 2}
SETTINGS = AtariSettings(
    game="catch", method="scratch", atoms=5, v_min=-2.0, v_max=2.0, clip_norm=0.05, lr=0.01
)


def made(seed: int = 0, settings: AtariSettings = SETTINGS) -> Learner:
    torch.manual_seed(seed)
    network = RainbowNetwork(frame_shape=(20, 20), patches=(4, 5), widths=(3, 4), **SMALL)
    policy = SinglePolicy(network, ATOMS).double()
    return Learner(policy, settings, torch.Generator().manual_seed(seed))


def batch(n: int = 7, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)

    def states():
        return torch.randint(0, 256, (n, 2, 20, 20), generator=random, dtype=torch.uint8)

    return Batch(
        states(),
        torch.randint(0, 3, (n,), generator=random),
        torch.randn(n, generator=random, dtype=torch.float64),
        torch.rand(n, generator=random, dtype=torch.float64),
        states(),
        torch.rand(n, generator=random, dtype=torch.float64),
    )


def projected(probabilities, value, discount):
    """The distribution of value + discount * z on the atoms, atom by atom."""
    found = torch.zeros(5, dtype=torch.float64)
    for probability, atom in zip(probabilities, ATOMS, strict=True):
        place = min(max(value + discount * atom, -2.0), 2.0) + 2.0
        below = min(int(place), 3)
        found[below] += probability * (1 - (place - below))
        found[below + 1] += probability * (place - below)
    return found


def test_an_update_is_the_written_out_one():
    learner, given = made(), batch()
    with torch.no_grad():  # a target network of other weights
        for parameter in learner.target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    learner.new_noise()
    plain = copy.deepcopy(learner)
    found = learner.update(given)

    plain.update(given._replace(weights=torch.zeros_like(given.weights)))  # draws the same noise
    policy, target = plain.policy, plain.target
    policy.load_state_dict(made().policy.state_dict())
    online = policy(given.next_states).softmax(-1) @ ATOMS
    wanted = torch.stack([
        projected(target(given.next_states)[n, online[n].argmax()].softmax(-1), r, g)
        for n, (r, g) in enumerate(zip(given.returns, given.discounts, strict=True))
    ]).detach()  # fmt: skip
    logits = policy(given.states)[torch.arange(7), given.actions]
    task = -(wanted * F.log_softmax(logits, dim=-1)).sum(-1)
    torch.testing.assert_close(found.losses.task, task.detach(), rtol=1e-10, atol=1e-12)
    loss = (given.weights * task).mean()
    torch.testing.assert_close(found.losses.total, loss.detach(), rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    torch.testing.assert_close(found.norm, norm, rtol=1e-10, atol=1e-12)
    assert norm > 0.05  # it is clipped below
    # Adam's first step is lr * g / (|g| + eps) of the clipped gradient.
    for mine, before, gradient in zip(
        learner.policy.parameters(), policy.parameters(), gradients, strict=True
    ):
        g = gradient * 0.05 / (norm + 1e-6)
        expected = before - 0.01 * g / (g.abs() + SETTINGS.adam_eps)
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-10)


def noise_of(module) -> torch.Tensor:
    return module.network.value_out.noise_in.clone()


def test_a_step_has_one_draw_and_the_target_one_of_its_own():
    learner, met = made(), {"policy": [], "target": []}
    for name in met:
        module = getattr(learner, name)
        module.network.register_forward_hook(
            lambda *_, name=name, module=module: met[name].append(noise_of(module))
        )
    state = batch().states[:1]
    for _ in range(2):
        learner.new_noise()
        learner.act(state)
        learner.update(batch())
    first, second = met["policy"][:3], met["policy"][3:]  # acting, s', s
    for draws in (first, second):
        assert len(draws) == 3
        assert all(torch.equal(draw, draws[0]) for draw in draws)
    assert not torch.equal(first[0], second[0])
    assert len(met["target"]) == 2
    assert not torch.equal(*met["target"])
    assert not torch.equal(met["target"][0], first[0])


def test_the_target_is_a_copy_until_it_is_copied_again():
    learner = made()
    before = copy.deepcopy(learner.target.state_dict())
    learner.new_noise()
    learner.update(batch())
    assert all(
        torch.equal(value, before[name]) for name, value in learner.target.state_dict().items()
    )
    changed = learner.policy.state_dict()
    assert not torch.equal(
        changed["network.trunk.first.weight"], before["network.trunk.first.weight"]
    )
    learner.copy_to_target()
    assert all(
        torch.equal(value, changed[name]) for name, value in learner.target.state_dict().items()
    )
    assert not any(p.requires_grad for p in learner.target.parameters())


def test_acting_takes_the_first_of_the_best_actions():
    learner = made()
    with torch.no_grad():
        for parameter in learner.policy.network.advantage_out.parameters():
            parameter.zero_()
    assert learner.act(batch().states[:1]) == 0
    with torch.no_grad():  # the highest atom of action 1 and 2 alike
        learner.policy.network.advantage_out.bias_mu.view(3, 5)[1:, -1] = 3.0
    assert learner.act(batch().states[:1]) == 1


def test_a_single_network_is_a_policy():
    assert isinstance(made().policy, Policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1_600}, "steps: expected more than the 1600 before the first update, got 1600"),
        ({"learn_start": 8}, "learn_start: expected at least the batch_size of 32, got 8"),
        ({"v_min": 3.0}, "v_min: expected less than v_max 2.0, got 3.0"),
        ({"patches": (5,)}, "patches: expected two"),
        ({"method": "finetune"}, "hub: the method finetune takes 1 source, got 0"),
        ({"method": "zoo-tuning", "hub": ("a",)}, "takes at least 2 sources, got 1"),
        ({"method": "scratch", "hub": ("a",)}, "takes 0 sources, got 1"),
        ({"method": "hub", "hub": ("a", "b"), "k": 3}, "k: expected at most the 2 sources"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        SETTINGS.replace(**changes)
