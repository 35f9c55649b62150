"""bench.atari says what a step costs beside its parts, and where a goal is missed."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import atari, jsonl
from bench.timing import Times
from hubpath_fast.tasks.atari.distribution import make_atoms
from hubpath_fast.tasks.atari.games import games
from hubpath_fast.tasks.atari.learn import Batch
from hubpath_fast.tasks.atari.settings import AtariSettings


@pytest.fixture(autouse=True)
def settings_of_the_process():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_row_has_every_part_without_the_emulator(tmp_path, capsys, monkeypatch):
    games.cache_clear()
    monkeypatch.setitem(sys.modules, "ale_py.roms", None)  # as if it were not installed
    monkeypatch.setattr(atari, "FIRST_UPDATE", 40)
    file = tmp_path / "rows.jsonl"
    row = atari.main(["--seconds", "0", "--clock", "cpu", "--out", str(file)])
    assert jsonl.read(file) == [row]
    assert row["rounds"] == 3
    assert set(row["ratios"]) == set(atari.RATIOS)
    median = {name: times[1] for name, times in row["seconds"].items()}
    assert all(seconds > 0 for seconds in median.values())
    parts = median["game"] + median["bare act and update"]
    assert row["ratios"]["step / its parts"] == pytest.approx(median["scratch: step"] / parts)
    assert row["ratios"]["replay / step"] == median["replay"] / median["scratch: step"]
    shown = capsys.readouterr().out
    assert shown.startswith("no game is played: Atari games need the emulator ale_py")
    assert shown.count("no game is played") == 1
    assert "goals are missed" in shown


def draws(monkeypatch, call):
    """The networks that get noise in a call, in order."""
    found = []
    monkeypatch.setattr(atari, "draw_noise", lambda network, generator: found.append(network))
    call()
    return found


def test_a_bare_step_draws_the_noise_of_each_network_once(monkeypatch):
    n = 2
    states = torch.randint(256, (n, 4, 225, 25)).to(torch.uint8)
    batch = Batch(
        states, torch.zeros(n, dtype=torch.int64), torch.ones(n), torch.ones(n), states,
        torch.ones(n),
    )  # fmt: skip
    settings = AtariSettings(game="seaquest", method="scratch")
    bare = atari.BareLoop(3, make_atoms(51, -10, 10), settings)
    found = draws(monkeypatch, atari.acting_and_updating(bare, states[:1], batch))
    assert found == [bare.online, bare.target]
    assert draws(monkeypatch, atari.acting(bare, states[:1])) == [bare.online]


def test_a_game_that_there_is_not_is_refused(capsys):
    pytest.importorskip("ale_py", reason="the Atari emulator is in the extra [atari]")
    with pytest.raises(SystemExit) as stopped:
        atari.main(["--game", "seaqest"])
    assert stopped.value.code == 2
    assert "did you mean seaquest?" in capsys.readouterr().err


def times(**changed: float) -> dict[str, Times]:
    """Milliseconds of each row, at the goals unless changed."""
    found = {
        "game": 1.0, "bare act": 3.0, "bare update": 16.0, "bare act and update": 19.0,
        "replay": 1.0,
        "scratch: step": 22.0, "scratch: act": 3.0, "scratch: update": 16.0,
        "hub K=2: step": 48.0, "hub K=2: act": 6.0, "hub K=2: update": 35.0,
        "hub K=1: step": 30.0,
    }  # fmt: skip
    seconds = {name: value / 1e3 for name, value in (found | changed).items()}
    return {name: Times(s, s, s, s, 5) for name, s in seconds.items()}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"game": 0.0, "bare act and update": 18.9}, ["step / its parts"]),
        ({"scratch: act": 9.0, "bare act": 1.0}, []),  # no part of a step is the agent's own
        ({"hub K=2: step": 49.0}, ["hub K=2 / scratch, step"]),
        ({"hub K=2: update": 36.0}, ["hub K=2 / scratch, update"]),
        ({"replay": 1.2}, ["replay / step"]),
        (
            {"scratch: step": 23.0, "game": 2.0, "hub K=2: step": 50.5},
            ["scratch: steps a second", "hub K=2: steps a second"],
        ),
    ],
)
def test_what_misses_its_goal_is_said(changed, missed):
    lines = [line for line, _ in atari.verdicts(times(**changed))]
    assert [line[:28].strip() for line in lines if line.endswith("missed")] == missed
