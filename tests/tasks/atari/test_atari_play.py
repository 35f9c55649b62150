"""Playing games: whole ones, the best action, raw scores, and nothing left changed."""

import inspect

import numpy as np
import pytest
import torch
from support.follow import Follow
from torch import nn

from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.atari.play import Episode, play_episodes
from hubpath_fast.tasks.atari.policy import SinglePolicy


class Reads(nn.Module):
    """Expects most of the action that is shown; asks of itself what ``play_episodes`` promises."""

    num_actions = 4

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Dropout(0.9), nn.Linear(1, 1)])
        self.register_buffer("atoms", torch.tensor([-1.0, 0.0, 1.0]))
        self.calls = 0

    def forward(self, states):
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        assert (states.dtype, tuple(states.shape)) == (torch.uint8, (1, 2, 6, 6))
        self.calls += 1
        logits = torch.zeros(1, 4, 3)
        logits[0, int(states[0, -1, 0, 0]), 2] = 1.0
        return self.layers[0](logits)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_whole_games_and_raw_scores():
    """Twelve steps over three lives; nothing is clipped; the env goes on, it is not made anew."""
    policy, env = Reads(), Follow()
    found = play_episodes(policy, env, 2, generator(), epsilon=0.0)
    assert found == [Episode(60.0, 12, False)] * 2
    assert env.resets == 2
    assert policy.calls == 24


def test_modes_come_back():
    policy = Reads()
    policy.train()
    policy.layers[1].eval()
    play_episodes(policy, Follow(), 1, generator())
    assert [m.training for m in policy.modules()] == [True, True, True, False]
    assert torch.is_grad_enabled()


def test_limits_truncate():
    assert play_episodes(None, Follow(limit=7), 1, generator())[0].truncated
    [found] = play_episodes(Reads(), Follow(limit=5), 1, generator(), 0.0)
    assert found == Episode(25.0, 5, True)
    [found] = play_episodes(Reads(), Follow(limit=12), 1, generator(), 0.0)
    assert found == Episode(60.0, 12, False)  # over, at the same step


def test_random_play_takes_each_action_alike():
    """Of 2,400 actions a share of 1/4 each: sd 0.0088."""
    env = Follow()
    found = play_episodes(None, env, 200, generator())
    shares = np.bincount(env.actions, minlength=4) / len(env.actions)
    assert np.abs(shares - 0.25).max() < 4 * 0.0088
    assert len({episode.score for episode in found}) > 5
    again = Follow()
    play_episodes(None, again, 200, generator())
    assert again.actions == env.actions


def test_epsilon_is_the_share_of_actions_that_are_drawn():
    """A quarter of the drawn ones are the best: 1 - 0.4 * 3/4 = 0.7 of them, sd 0.0094."""
    policy, env = Reads(), Follow()
    found = play_episodes(policy, env, 200, generator(1), epsilon=0.4)
    best = sum((episode.score + episode.steps) / 6 for episode in found) / len(env.actions)
    assert abs(best - 0.7) < 4 * 0.0094
    assert abs(policy.calls / len(env.actions) - 0.6) < 0.04  # who is not followed is not asked
    policy = Reads()
    play_episodes(policy, Follow(), 1, generator(), epsilon=1.0)
    assert policy.calls == 0


def test_by_default_one_action_in_a_thousand_is_drawn():
    assert inspect.signature(play_episodes).parameters["epsilon"].default == 0.001


def test_who_looks_on_sees_each_step_and_changes_none():
    seen, env, other = [], Follow(), Follow()
    found = play_episodes(Reads(), env, 2, generator(3), 0.3, on_step=seen.append)
    assert found == play_episodes(Reads(), other, 2, generator(3), 0.3)
    assert env.actions == other.actions == [moment.action for moment in seen]
    assert [(m.episode, m.step) for m in seen] == [(e, s) for e in (0, 1) for s in range(12)]
    assert sum(m.reward for m in seen[:12]) == seen[11].score == found[0].score
    assert [int(m.screen[0, 0, 0]) for m in seen[:12]] == list(range(0, 120, 10))  # before it
    shown = [int(m.states[0, -1, 0, 0]) for m in seen]
    assert [int(m.logits[:, 2].argmax()) for m in seen] == shown
    assert sum(m.info["life_lost"] for m in seen) == 4


def test_random_play_shows_no_logits():
    seen = []
    play_episodes(None, Follow(), 1, generator(), on_step=seen.append)
    assert all(moment.logits is None and moment.states is None for moment in seen)


def test_a_network_plays_by_its_means():
    """A true policy on frames: it takes the action whose distribution has the largest mean."""
    network = RainbowNetwork(4, num_atoms=5, hidden=8, history=2, frame_shape=(6, 6),
                             patches=(3, 2), widths=(4, 4))  # fmt: skip
    policy, seen = SinglePolicy(network, torch.linspace(-2, 2, 5)), []
    play_episodes(policy, Follow(), 1, generator(), 0.0, on_step=seen.append)
    policy.eval()
    for moment in seen:
        with torch.no_grad():
            means = policy(moment.states)[0].softmax(-1) @ policy.atoms
        assert moment.action == int(means.argmax())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 0}, "episodes: expected an integer of at least 1, got 0"),
        ({"episodes": 1.0}, "episodes: expected an integer"),
        ({"epsilon": 1.5}, r"epsilon: expected a share in 0\.\.1, got 1.5"),
        ({"epsilon": float("nan")}, r"epsilon: expected a share in 0\.\.1, got nan"),
    ],
)
def test_wrong_numbers(change, message):
    given = {"episodes": 1, "generator": generator(), **change}
    with pytest.raises(ValueError, match=message):
        play_episodes(None, Follow(), **given)


def test_a_policy_of_another_game():
    env = Follow()
    env.num_actions = 6
    with pytest.raises(ValueError, match="expected one for the game's 6 actions, got one for 4"):
        play_episodes(Reads(), env, 1, generator())
