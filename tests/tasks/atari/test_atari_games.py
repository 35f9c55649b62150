"""Names of games, and scores as shares of a human's."""

import builtins
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hubpath_fast.tasks import atari
from hubpath_fast.tasks.atari.games import SCORES, games, reference_scores

REPOSITORY = Path(__file__).parents[3]


def test_human_normalized_values():
    """0 for chance, 1 for a human, and the published score of a Data-Efficient Rainbow."""
    assert atari.human_normalized(227.8, "alien") == 0
    assert atari.human_normalized(302.8, "JamesBond") == 1
    assert atari.human_normalized(354.1, "seaquest") == pytest.approx(285.7 / 41986.3)
    assert atari.human_normalized(1338.5 + 15779.5 / 4, "River Raid") == pytest.approx(0.25)
    halves = atari.human_normalized(np.array([257.6, 1335.05, 2412.5]), "ALE/Gopher-v5")
    assert halves.tolist() == pytest.approx([0, 0.5, 1])


def test_scores_of_the_27_games():
    """The 26 of Atari-100k and Riverraid; sums guard each digit of the table."""
    assert len(SCORES) == 27
    assert sum(s.human for s in SCORES.values()) == pytest.approx(336_310.1)
    assert sum(s.random for s in SCORES.values()) == pytest.approx(20_500.1)


def test_a_game_without_reference_is_an_error():
    with pytest.raises(ValueError, match=r"game 'tetris': no scores .* those of alien, "):
        reference_scores("tetris")
    with pytest.raises(ValueError, match=r"game 'gophr': .* did you mean gopher\?"):
        atari.human_normalized(1.0, "gophr")
    with pytest.raises(ValueError, match="game: expected a name such as 'gopher', got 3"):
        atari.human_normalized(1.0, 3)


@pytest.mark.parametrize(
    ("spelling", "game"),
    [
        ("ALE/Gopher-v5", "gopher"),
        ("GopherNoFrameskip-v4", "gopher"),
        (" gopher ", "gopher"),
        ("JamesBond", "jamesbond"),
        ("James Bond", "jamesbond"),
        ("jamesbond", "jamesbond"),
        ("ALE/Jamesbond-v5", "jamesbond"),
        ("KungFuMaster", "kung_fu_master"),
        ("kung-fu master", "kung_fu_master"),
        ("Ms. Pacman", "ms_pacman"),
        ("ALE/TicTacToe3D-v5", "tic_tac_toe_3d"),
        ("Up'n Down", "up_n_down"),
    ],
)
def test_spellings(spelling, game):
    pytest.importorskip("ale_py", reason="the emulator lists the games")
    assert atari.find_game(spelling) == game


@pytest.mark.parametrize(
    ("name", "hint"),
    [("gophr", "did you mean gopher?"), ("bond", "did you mean jamesbond"), ("", "`hubpath")],
)
def test_unknown_games(name, hint):
    pytest.importorskip("ale_py", reason="the emulator lists the games")
    with pytest.raises(ValueError, match=f"^game {name!r} is unknown; {re.escape(hint)}"):
        atari.find_game(name)


def test_games_that_one_plays_alone():
    pytest.importorskip("ale_py", reason="the emulator lists the games")
    assert set(SCORES) < set(games())
    assert "joust" not in games()


def test_without_the_emulator_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name.startswith(("ale_py", "emulator")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **keywords)

    games.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    expected = re.escape('pip install "hubpath-fast[atari]" installs both')
    with pytest.raises(ValueError, match=expected):
        atari.find_game("gopher")
    with pytest.raises(ValueError, match=expected):
        atari.make_env("gopher", seed=0, training=True)
    monkeypatch.setattr("hubpath_fast.tasks.atari.environments.find_game", str)
    with pytest.raises(ValueError, match=expected):
        atari.make_env("gopher", seed=0, training=True)
    assert atari.human_normalized(302.8, "jamesbond") == 1


def test_importing_the_package_does_not_import_the_emulator():
    names = "{'ale_py', 'gymnasium', 'cv2'} & set(sys.modules)"
    code = f"import sys, hubpath_fast.tasks.atari, hubpath_fast.cli; print({names})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "set()\n"), run.stderr
