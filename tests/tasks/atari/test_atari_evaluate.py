"""``hubpath atari evaluate`` and ``games``: figures of whole games, and what is wrong in words."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import hubpath, refused
from torch import nn

from hubpath_fast.recipes.atari_evaluate import evaluate_atari, evaluation_lines, open_player
from hubpath_fast.tasks.atari.games import games
from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.atari.open_game import known_game, open_game
from hubpath_fast.tasks.atari.policies import make_policy
from hubpath_fast.tasks.atari.settings import AtariSettings
from hubpath_fast.tasks.atari.sources import Record
from hubpath_fast.training.checkpoint import save_checkpoint

GAMES = 8


def save_run(folder, game="catch", step=2_000, **changes):
    """A run from scratch of 2,000 steps that stands at this one, with random weights."""
    _, defaults = known_game(game)
    given = {**defaults, "hidden": 8, "steps": 2_000, "method": "scratch", **changes}
    settings = AtariSettings.from_dict({"game": game, **given})
    env = open_game(game, 0, training=False)
    network = RainbowNetwork(
        env.num_actions, settings.atoms, settings.hidden, env.history, env.frame_shape,
        settings.patches, settings.widths,
    )  # fmt: skip
    modules = nn.ModuleDict({
        name: make_policy(settings, [network], env.num_actions) for name in ("online", "target")
    })  # fmt: skip
    config = Record(settings, tuple(env.action_names), (network.config(),)).to_dict()
    save_checkpoint(folder / "last", modules, {"progress": {"step": step}}, config)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return save_run(tmp_path_factory.mktemp("runs") / "src-catch")


def test_the_figures_are_those_of_the_games(run):
    found = evaluate_atari(open_player(run, None), GAMES, seed=3)
    scores = np.array(found["scores"])
    assert len(scores) == len(found["episode_steps"]) == found["episodes"] == GAMES
    assert found["mean"] == scores.mean()
    assert found["sd"] == pytest.approx(scores.std(ddof=1))
    assert found["median"] == np.median(scores)
    low, high = found["interval"]
    assert scores.min() <= low <= found["mean"] <= high <= scores.max()
    assert (found["game"], found["method"], found["step"]) == ("catch", "scratch", 2_000)
    assert (found["seed"], found["epsilon"]) == (3, 0.001)
    assert found["human_normalized"] is None


def test_a_seed_repeats_and_another_differs(run):
    player = open_player(run, None)
    first = evaluate_atari(player, GAMES, seed=1)
    assert evaluate_atari(player, GAMES, seed=1) == first
    assert evaluate_atari(player, GAMES, seed=2)["scores"] != first["scores"]


def test_the_command_writes_the_figures_beside_the_run(run, tmp_path):
    said = hubpath("atari", "evaluate", run, "--episodes", GAMES, "--seed", 3)
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored == evaluate_atari(open_player(run, None), GAMES, seed=3)
    lines = said.stdout.splitlines()
    assert lines[:3] == evaluation_lines(stored)
    low, high = stored["interval"]
    assert f"mean {stored['mean']:.1f} (95 % interval {low:.1f} to {high:.1f}" in lines[1]
    assert lines[0].startswith("catch, scratch, 2000 steps: 8 games of ")
    assert lines[-1] == str(run / "evaluation.json")
    hubpath("atari", "evaluate", run, "--episodes", 1, "--out", tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text())["interval"] is None
    assert json.loads((run / "evaluation.json").read_text()) == stored


def test_the_video_is_of_the_first_game(run, tmp_path):
    arguments = ("atari", "evaluate", run, "--episodes", 2, "--out", tmp_path / "x.json")
    said = hubpath(*arguments, "--video", tmp_path / "game.gif")
    stored = json.loads((tmp_path / "x.json").read_text())
    assert Image.open(tmp_path / "game.gif").n_frames == stored["episode_steps"][0]
    assert str(tmp_path / "game.gif") in said.stdout.splitlines()
    without = tmp_path / "without.json"
    hubpath(*arguments[:-1], without)
    assert json.loads(without.read_text()) == stored


def test_a_run_that_is_not_finished_says_so(tmp_path):
    player = open_player(save_run(tmp_path / "half", step=1_700), None)
    assert player.title == "scratch, 1700 of 2000 steps"
    assert player.step == 1_700


def test_random_play_by_the_same_command(tmp_path):
    said = hubpath("atari", "evaluate", "--random", "catch", "--episodes", 40)
    assert said.stdout.startswith("catch, random play: 40 games of ")
    assert not any(tmp_path.iterdir())
    out = tmp_path / "random.json"
    hubpath("atari", "evaluate", "--random", "catch", "--episodes", 40, "--out", out)
    stored = json.loads(out.read_text())
    assert (stored["method"], stored["step"]) == ("random", None)
    assert f"mean {stored['mean']:.1f} " in said.stdout


def test_human_normalized_scores_of_a_game_of_the_emulator():
    pytest.importorskip("ale_py", reason="the Atari emulator is in the extra [atari]")
    found = evaluate_atari(open_player(None, "River Raid"), 1)
    assert found["game"] == "riverraid"
    assert found["human_normalized"] == pytest.approx((found["mean"] - 1338.5) / 15779.5)
    assert (found["human"], found["random"]) == (17118.0, 1338.5)
    share = (
        f"human-normalised {found['human_normalized']:.3f}: 0 is random play (1338.5), 1 a human"
    )
    assert evaluation_lines(found)[2] == f"{share} (17118)"


def test_wrong_input(run, tmp_path):
    assert "expected the folder of a run, or --random GAME, got neither" in refused(
        "atari", "evaluate"
    )
    assert "got both" in refused("atari", "evaluate", run, "--random", "catch")
    assert "holds no run of `hubpath atari`" in refused("atari", "evaluate", tmp_path)
    assert "ends in .gif, got" in refused("atari", "evaluate", run, "--video", "game.mp4")
    assert "device: torch sees no CUDA device" in refused(
        "atari", "evaluate", run, "--device", "cuda:7"
    )
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "config.json").write_text("{}")
    assert "is not of a run of `hubpath atari`" in refused("atari", "evaluate", tmp_path)


def test_damaged_weights_are_named(tmp_path):
    folder = save_run(tmp_path / "run")
    weights = next((folder / "last").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:2_000])
    assert str(weights) in refused("atari", "evaluate", folder)
    folder = save_run(tmp_path / "stepless")
    torch.save({}, folder / "last" / "state.pt")
    assert "does not say its step" in refused("atari", "evaluate", folder)


def test_games():
    pytest.importorskip("ale_py", reason="the emulator lists the games")
    everything = hubpath("atari", "games").stdout.splitlines()
    assert len(everything) > 60
    assert "pong                human 14.6, random -20.7" in everything
    assert "tetris" in everything
    quests = hubpath("atari", "games", "*quest").stdout.splitlines()
    assert [line.split()[0] for line in quests] == ["seaquest"]
    named = hubpath("atari", "games", "ms. pac").stdout.splitlines()
    assert [line.split()[0] for line in named] == ["ms_pacman"]
    assert "no game fits 'gofer'; did you mean gopher?" in refused("atari", "games", "gofer")


OURS = [
    f"{name:<20}a small game of our own, without the emulator"
    for name in ("catch", "cross", "keep", "medley")
]


def test_our_small_games_are_among_them():
    pytest.importorskip("ale_py", reason="the emulator lists the games")
    assert hubpath("atari", "games").stdout.splitlines()[-4:] == OURS
    ours = hubpath("atari", "games", "?ross*").stdout.splitlines()
    assert ours == ["crossbow", OURS[1]]


def test_games_without_the_emulator_are_our_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py.roms", None)
    games.cache_clear()
    done = hubpath("atari", "games")
    assert done.stdout.splitlines() == OURS
    assert "note Atari games need the emulator ale_py" in done.stderr
    assert 'pip install "hubpath-fast[atari]"' in done.stderr
    assert hubpath("atari", "games", "ke?p").stdout.splitlines() == [OURS[2]]
    said = refused("atari", "games", "kep")
    assert "no game fits 'kep'; did you mean keep?" in said
    assert 'pip install "hubpath-fast[atari]"' in said
