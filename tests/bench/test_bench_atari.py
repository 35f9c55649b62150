"""bench.atari says what a step costs beside its parts, and where a goal is missed."""

from __future__ import annotations

import pytest
import torch

from bench import atari, jsonl
from bench.timing import Times


@pytest.fixture(autouse=True)
def settings_of_the_process():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_a_row_has_every_part_without_the_emulator(tmp_path, capsys, monkeypatch):
    def missing(*args):
        raise ValueError("no emulator")

    monkeypatch.setattr(atari, "open_game", missing)
    monkeypatch.setattr(atari, "FIRST_UPDATE", 40)
    file = tmp_path / "rows.jsonl"
    row = atari.main(["--seconds", "0", "--clock", "cpu", "--out", str(file)])
    assert jsonl.read(file) == [row]
    assert row["rounds"] == 3
    assert set(row["ratios"]) == set(atari.RATIOS)
    median = {name: times[1] for name, times in row["seconds"].items()}
    assert all(seconds > 0 for seconds in median.values())
    parts = median["game"] + median["scratch: act"] + median["bare update"]
    assert row["ratios"]["step / its parts"] == pytest.approx(median["scratch: step"] / parts)
    assert row["ratios"]["replay / step"] == median["replay"] / median["scratch: step"]
    shown = capsys.readouterr().out
    assert shown.startswith("no game is played: no emulator\n")
    assert "goals are missed" in shown


def test_a_game_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        atari.main(["--game", "seaqest"])
    assert stopped.value.code == 2
    assert "did you mean seaquest?" in capsys.readouterr().err


def times(**changed: float) -> dict[str, Times]:
    """Milliseconds of each row, at the goals unless changed."""
    found = {
        "game": 1.0, "bare update": 16.0, "replay": 1.0,
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
        ({"game": 0.0, "bare update": 15.9}, ["step / its parts"]),
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
