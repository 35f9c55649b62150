"""The environment: gymnasium's own preprocessing is the truth for pixels, rewards and ends."""

import operator
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ale_py", reason="the Atari emulator is in the extra [atari]")
gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is in the extra [atari]")

from hubpath_fast.tasks.atari import make_env  # noqa: E402 after the skips

REPOSITORY = Path(__file__).parents[3]


def play(env, actions):
    """What each of these actions brings; a game that is over starts again."""
    seen = []
    for action in actions:
        seen.append(env.step(action))
        if seen[-1][2] or seen[-1][3]:
            seen.append((*env.reset(), None, None, None))
    return seen


def same(one, other) -> bool:
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in pairs)


def actions_of(env, count, seed=0):
    return np.random.default_rng(seed).integers(env.num_actions, size=count).tolist()


@pytest.mark.parametrize(
    ("game", "actions", "points"),
    [
        ("Alien", 18, 80),
        ("Gopher", 8, 100),
        ("Jamesbond", 18, 0),  # loses three lives
        ("Seaquest", 18, 20),
        ("Riverraid", 18, 960),
    ],
)
def test_equals_gymnasium(game, actions, points):
    """300 steps: pixels, rewards, ends and lives, with zeros for the frames before the first."""
    env, truth = make_env(game, seed=0, training=False, noop_max=0), gymnasiums(game)
    assert env.num_actions == len(env.action_names) == actions == truth.action_space.n
    assert env.action_names == tuple(truth.unwrapped.get_action_meanings())
    assert np.array_equal(env.reset()[0], truth.reset(seed=5)[0])
    assert equal_steps(env, truth, actions_of(env, 300, seed=9)) == points


def test_the_end_equals_gymnasium():
    """The step in which a game ends shows what the step before did; then the next game."""
    env, truth = make_env("riverraid", seed=0, training=False, noop_max=0), gymnasiums("Riverraid")
    assert np.array_equal(env.reset()[0], truth.reset()[0])
    equal_steps(env, truth, actions_of(env, 2_000))
    assert not env._running
    assert np.array_equal(env.reset()[0], truth.reset()[0])


def gymnasiums(game):
    """Its own preprocessing, without no-ops, of the game without sticky actions."""
    pytest.importorskip("cv2", reason="gymnasium's preprocessing needs OpenCV")
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    raw = gymnasium.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
    return FrameStackObservation(AtariPreprocessing(raw, noop_max=0), 4, padding_type="zero")


def equal_steps(env, truth, actions):
    """Plays both until the game is over, and returns the score."""
    score = 0.0
    for step, action in enumerate(actions):
        frames, reward, over, truncated, info = env.step(action)
        true = truth.step(action)
        assert (frames.dtype, frames.shape) == (np.uint8, (4, 84, 84))
        assert np.array_equal(frames, true[0]), step
        assert (reward, over, truncated, info["lives"]) == (*true[1:4], true[4]["lives"]), step
        score += reward
        if over:
            break
    return score


def test_a_lost_life_ends_the_learners_episode_while_the_game_goes_on():
    """Seaquest by chance, whole games: the flag at each life but the last, rewards and newest
    frames as in evaluation, whose older frames stay."""
    training = make_env("seaquest", seed=0, training=True, noop_max=0)
    evaluation = make_env("seaquest", seed=0, training=False, noop_max=0)
    (frames, info), (kept, other) = training.reset(), evaluation.reset()
    assert info == other == {"lives": 4, "life_lost": False}
    assert not frames[:3].any()
    assert frames[3].any()
    lost, lives, since, score = [], 4, 1, 0.0
    for action in actions_of(training, 3_000, seed=4):
        frames, reward, over, truncated, info = training.step(action)
        kept, *rest = evaluation.step(action)
        assert [reward, over, truncated, info] == rest
        assert info["life_lost"] == (0 < info["lives"] < lives)
        since = 1 if info["life_lost"] else min(since + 1, 4)
        assert np.array_equal(frames[4 - since :], kept[4 - since :])
        assert not frames[: 4 - since].any()
        if info["life_lost"]:
            assert not over
            assert kept[:3].any()
            lost.append((info["lives"], score))
        score, lives = score + reward, info["lives"]
        if over:
            break
    assert over
    assert info == {"lives": 0, "life_lost": False}  # the last life is the game's end instead
    assert [left for left, _ in lost] == [3, 2, 1]
    assert 0 < lost[0][1] < score  # points are added up over lost lives


def test_a_truncated_game_is_not_over():
    env = make_env("gopher", seed=0, training=True, max_steps=5)
    for _ in range(2):
        env.reset()
        ends = [env.step(0)[2:4] for _ in range(5)]
        assert ends == [(False, False)] * 4 + [(False, True)]
        with pytest.raises(ValueError, match="no game is running; call reset"):
            env.step(0)
    assert make_env("gopher", seed=0, training=True).max_steps == 27_000


def test_the_end_of_a_game():
    """At the limit of steps it is over, not truncated. What is then seen are screens of the step
    before, so that they belong to a state."""
    env = make_env("riverraid", seed=0, training=False, noop_max=0)
    actions = actions_of(env, 2_000)
    env.reset()
    steps = 1 + next(i for i, action in enumerate(actions) if env.step(action)[2])
    again = make_env("riverraid", seed=0, training=False, noop_max=0, max_steps=steps)
    again.reset()
    play(again, actions[: steps - 1])
    other = make_running(again)
    end, same_end = again.step(actions[steps - 1]), other.step(actions[steps - 1])
    assert end[2:4] == (True, False)
    assert same([end], [same_end])


def test_no_ops_are_0_to_29_frames_and_drawn_anew_in_each_game():
    """As randrange(30); drawn from the seed that is set once, not at each reset."""

    def starts(seed, noop_max, count=24):
        env = make_env("gopher", seed, training=False, noop_max=noop_max)
        return [(env.reset(), env._ale.getEpisodeFrameNumber())[1] for _ in range(count)]

    assert set(starts(0, 3)) == {0, 1, 2}
    assert set(starts(0, 0, 2)) == set(starts(0, 1, 2)) == {0}
    drawn = starts(1, 30)
    assert 0 <= min(drawn) <= 4
    assert 25 <= max(drawn) <= 29
    assert drawn == starts(1, 30)
    assert drawn != starts(2, 30)


def test_seeds():
    """The same seed plays the same, another one otherwise; a seed at a reset starts all over."""
    one, same_seed, other = (make_env("gopher", seed, training=True) for seed in (7, 7, 8))
    starts = [env.reset()[0] for env in (one, same_seed, other)]
    assert np.array_equal(starts[0], starts[1])
    actions = actions_of(one, 60)
    first = play(one, actions)
    assert same(first, play(same_seed, actions))
    assert not same(first, play(other, actions))
    assert np.array_equal(other.reset(seed=7)[0], starts[0])
    assert same(first, play(other, actions))


def test_it_is_an_environment_of_gymnasium():
    from gymnasium.utils.env_checker import check_env

    env = make_env("jamesbond", seed=0, training=True)
    assert isinstance(env, gymnasium.Env)
    check_env(env, skip_render_check=True)
    assert env.render().shape == (210, 160, 3)


CONTINUE = """
import sys, torch, hubpath_fast.tasks.atari as atari
state, actions = torch.load(sys.argv[1], weights_only=True).values()
env = atari.make_env("seaquest", seed=99, training=True)
env.load_state_dict(state)
seen = []
for action in actions:
    seen.append(env.step(action))
    if seen[-1][2] or seen[-1][3]:
        seen.append((*env.reset(), None, None, None))
torch.save([(torch.from_numpy(s[0]), *s[1:]) for s in seen], sys.argv[2])
"""


def test_another_process_goes_on_to_the_bit(tmp_path):
    """Over the end of this game into the next, whose no-ops are drawn from the stored generator;
    and the emulator greets nobody."""
    env = make_env("seaquest", seed=3, training=True, max_steps=300)
    env.reset()
    play(env, actions_of(env, 120))
    later = actions_of(env, 700, seed=1)
    torch.save({"state": env.state_dict(), "actions": later}, tmp_path / "state.pt")
    expected = play(make_running(env), later)
    assert sum(step[2] is None for step in expected) >= 2
    run = subprocess.run(
        [sys.executable, "-c", CONTINUE, tmp_path / "state.pt", tmp_path / "seen.pt"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    found = [(s[0].numpy(), *s[1:]) for s in torch.load(tmp_path / "seen.pt", weights_only=True)]
    assert same(found, expected)


def make_running(env):
    """A new environment in the state of this one, with the usual limit of steps."""
    other = make_env(env.game, seed=42, training=env.training)
    other.load_state_dict(env.state_dict())
    return other


@pytest.mark.parametrize("game", ["alien", "gopher", "jamesbond", "riverraid"])
def test_a_state_goes_on_in_a_new_environment(game):
    env = make_env(game, seed=0, training=False)
    env.reset()
    play(env, actions_of(env, 50))
    other = make_running(env)
    actions = actions_of(env, 80, seed=1)
    assert same(play(env, actions), play(other, actions))


def test_the_steps_of_a_game_belong_to_its_state():
    env, other = (make_env("gopher", seed, training=True, max_steps=5) for seed in (0, 1))
    env.reset()
    play(env, [0, 0, 0])
    other.load_state_dict(env.state_dict())
    assert [other.step(0)[3] for _ in range(2)] == [False, True]


def test_a_state_after_the_end_still_wants_a_reset():
    env = make_env("gopher", seed=0, training=False, max_steps=1)
    env.reset()
    env.step(0)
    other = make_running(env)
    with pytest.raises(ValueError, match="call reset"):
        other.step(0)
    assert np.array_equal(env.reset()[0], other.reset()[0])


def damage(name, change):
    def of(state):
        state[name] = change(state[name])
        return state

    return of


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (damage("emulator", lambda blob: blob[:5_000]), "damaged, the emulator's 5000 bytes"),
        (damage("emulator", lambda blob: blob ^ 1), "damaged, the emulator's"),
        (damage("emulator", lambda blob: blob.float()), "damaged, emulator should be uint8"),
        (damage("stack", lambda stack: stack[:3]), r"damaged, stack should be uint8 \[4, 84, 84\]"),
        (damage("screens", lambda _: None), r"damaged, screens should be uint8 \[2, 210, 160\]"),
        (damage("generator", lambda state: state[:9]), "state of gopher: damaged"),
        (damage("steps", lambda _: "many"), "state of gopher: damaged"),
        (damage("game", lambda _: "alien"), "expected one of gopher, got one of alien"),
        (lambda state: {"game": "gopher"}, "damaged, emulator, checksum, .* missing"),
    ],
)
def test_a_damaged_state_is_named_and_changes_nothing(damaged, message):
    env = make_env("gopher", seed=0, training=True)
    env.reset()
    play(env, actions_of(env, 5))
    before = env.state_dict()
    with pytest.raises(ValueError, match=message):
        env.load_state_dict(damaged(env.state_dict()))
    after = env.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        same_value = torch.equal if torch.is_tensor(value) else operator.eq
        assert same_value(value, after[name]), name


def test_bytes_that_are_no_state_of_the_emulator():
    """Whose checksum is right: the emulator itself refuses them, by a SystemError."""
    env = make_env("gopher", seed=0, training=True)
    state = env.state_dict()
    state["emulator"] = state["emulator"][:5_000].clone()
    state["checksum"] = zlib.crc32(state["emulator"].numpy().tobytes())
    with pytest.raises(ValueError, match="state of gopher: damaged, "):
        env.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"game": "gophr"}, "did you mean gopher"),
        ({"seed": -1}, r"seed: expected an integer in 0\.\.\d+, got -1"),
        ({"seed": 0.5}, "seed: expected an integer"),
        ({"seed": True}, "seed: expected an integer"),
        ({"noop_max": -1}, "noop_max: expected an integer >= 0, got -1"),
        ({"max_steps": 0}, "max_steps: expected an integer >= 1, got 0"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        make_env(**{"game": "gopher", "seed": 0, "training": True, **change})


@pytest.mark.parametrize("action", [8, -1, 1.0, "FIRE", None])
def test_wrong_actions(action):
    env = make_env("gopher", seed=0, training=True)
    with pytest.raises(ValueError, match="no game is running"):
        env.step(0)
    env.reset()
    with pytest.raises(ValueError, match=r"action: expected an integer in 0\.\.7, got "):
        env.step(action)
    env.step(torch.tensor(7))
    env.step(np.int64(7))
