"""A run on a game that is killed at any point of a step or a save goes on to the same bits, and
what a user meets who finds its files damaged, its disk full or its folder in use."""

from __future__ import annotations

import errno
import io
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.command import hubpath, refused
from support.dying import die, die_at, is_killed
from tasks.atari.atari_random_kills import run_of

from hubpath_fast import files
from hubpath_fast.checkpoints import find_checkpoint, folders
from hubpath_fast.locks import locked
from hubpath_fast.recipes.atari_fit import fit_atari
from hubpath_fast.recipes.atari_settings import read_settings
from hubpath_fast.tasks.atari import replay_files
from hubpath_fast.tasks.atari.agent import REPLAY, Agent
from hubpath_fast.tasks.atari.replay_files import ReplayFiles
from hubpath_fast.training.checkpoint import load_state

QUIET = Console(quiet=True)
differences = run_of("catch").differences
TINY = {
    "steps": 45, "learn_start": 20, "batch_size": 4, "hidden": 4, "atoms": 5, "target_every": 15,
    "n_step": 3, "log_every": 5, "eval_every": 30, "eval_episodes": 1, "final_episodes": 1,
    "save_every": 8,
}  # fmt: skip
COMMAND = ["atari", "pretrain", "catch", *(
    word for name, value in TINY.items() for word in ("--set", f"{name}={value}"))]  # fmt: skip


def fit(out: Path, resume: bool = False, **changes):
    settings = {"game": "catch", "method": "scratch"} | TINY | changes
    return fit_atari(read_settings(settings), out, resume, QUIET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit(out)
    return out


def half_of_a_chunk(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".{path.name}.0123{files.UNFINISHED}").write_bytes(data[: len(data) // 2])
    die()


def half_of_the_state(state, file):
    torch_save(state, buffer := io.BytesIO())
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    die()


torch_save = torch.save
HALF = {"write_bytes": half_of_a_chunk, "save": half_of_the_state}
# What, whose, the n-th call of it, and whether it dies before, in midst of, or after it.
POINTS = [
    ("step", Agent, 5, "after"),  # before the first checkpoint
    ("step", Agent, 21, "before"),  # of the second update
    ("write_bytes", replay_files, 3, "midst"),
    ("write_bytes", replay_files, 1, "after"),
    ("write_bytes", replay_files, 4, "after"),
    ("save", torch, 4, "midst"),
    ("_rename", folders, 4, "after"),  # the old one was moved away, the new one not yet there
    ("tidy", ReplayFiles, 4, "before"),
    ("evaluate", Agent, 1, "after"),
    ("evaluate", Agent, 3, "before"),  # the final one
]


def fit_and_die(out, point):
    """In a process that was started for it: the ``nth`` call is its last."""
    call, owner, nth, when = POINTS[point]
    die_at(owner, call, nth, when, HALF)
    fit(out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("point", range(len(POINTS)), ids=[f"{c}-{n}-{w}" for c, _, n, w in POINTS])
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, point):
    assert is_killed(fit_and_die, tmp_path / "run", point)
    torch.manual_seed(12345)  # the second process starts from anywhere
    fit(tmp_path / "run", resume=True)
    assert differences(whole, tmp_path / "run") == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_where_the_run_stands_and_it_goes_on_from_there(
    whole, tmp_path, monkeypatch, name
):
    out, step = tmp_path / "run", Agent.step

    def signalled(self):
        step(self)
        if self.progress.step == 33:  # not a step that is saved
            os.kill(os.getpid(), signal.Signals[name])

    monkeypatch.setattr(Agent, "step", signalled)
    said = hubpath(*COMMAND, "--out", out, status=130).stdout
    assert f"stopped by {name} at step 33" in said
    assert load_state(out / "last")["progress"]["step"] == 33
    monkeypatch.undo()
    hubpath(*COMMAND, "--out", out, "--resume")
    assert differences(whole, out) == []


@pytest.mark.parametrize(("step", "final"), [(30, False), (45, False), (45, True)])
def test_a_signal_in_an_evaluation_is_not_kept_waiting(whole, tmp_path, monkeypatch, step, final):
    out, evaluate, games = tmp_path / "run", Agent.evaluate, []

    def signalled(self, episodes, is_final=False):
        if (self.progress.step, is_final) == (step, final):
            os.kill(os.getpid(), signal.SIGTERM)
        found = evaluate(self, episodes, is_final)
        games.append((self.progress.step, is_final))
        return found

    monkeypatch.setattr(Agent, "evaluate", lambda self, n, final=False: signalled(self, n, final))
    said = hubpath(*COMMAND, "--out", out, status=130).stdout
    assert f"stopped by SIGTERM at step {step}" in said
    assert (step, final) not in games
    assert load_state(out / "last")["progress"]["step"] == step
    assert not (out / "result.json").exists()
    monkeypatch.undo()
    hubpath(*COMMAND, "--out", out, "--resume")
    assert differences(whole, out) == []


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that has saved step 32 and then crashed, with four chunks."""
    out, step = tmp_path / "run", Agent.step

    def crash(self):
        step(self)
        if self.progress.step == 35:
            raise MemoryError

    monkeypatch.setattr(Agent, "step", crash)
    with pytest.raises(MemoryError):
        fit(out)
    monkeypatch.undo()
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*")
            if path.is_file() and "tensorboard" not in path.parts}  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?!"), "is damaged"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_chunk_is_named_and_nothing_is_lost(whole, stopped, spoil, message):
    chunk = sorted((stopped / REPLAY).iterdir())[1]
    good = chunk.read_bytes()
    spoil(chunk)
    held = contents(stopped / REPLAY), contents(stopped / "last")
    said = refused(*COMMAND, "--out", stopped, "--resume")
    assert f"{chunk} {message}" in said
    assert "restore the file from a copy, or start the run anew with another --out" in said
    assert "Traceback" not in said
    assert held == (contents(stopped / REPLAY), contents(stopped / "last"))
    chunk.write_bytes(good)  # from a copy
    hubpath(*COMMAND, "--out", stopped, "--resume")
    assert differences(whole, stopped) == []


@pytest.mark.parametrize("where", ["the chunk", "the state"])
def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_whole(
    whole, stopped, monkeypatch, where
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "the chunk":
        monkeypatch.setattr(replay_files, "write_bytes", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    said = hubpath(*COMMAND, "--out", stopped, "--resume", status=1).stderr
    assert "No space left on device" in said
    assert "checkpoint is whole" in said
    assert "make room and resume" in said
    assert "Traceback" not in said
    monkeypatch.undo()
    assert load_state(stopped / "last")["progress"]["step"] == 32
    hubpath(*COMMAND, "--out", stopped, "--resume")
    assert differences(whole, stopped) == []


def test_two_runs_in_one_folder(stopped):
    held = contents(stopped)
    with locked(stopped):
        said = refused(*COMMAND, "--out", stopped, "--resume")
    assert "out: another run is at work in" in said
    assert held == contents(stopped)


def test_chunks_that_no_checkpoint_names_do_no_harm(whole, stopped):
    """Such as of a run in the same folder whose checkpoint was deleted to start anew."""
    held = {path.name for path in (stopped / REPLAY).iterdir()}
    assert len(held) == 4
    for path in find_checkpoint(stopped / "last").iterdir():
        path.unlink()
    (stopped / "last").rmdir()
    (stopped / REPLAY / "000000000-0123456789abcdef.chunk").write_bytes(b"of another")
    fit(stopped)
    assert differences(whole, stopped) == []


@pytest.fixture(scope="module")
def sources(whole, tmp_path_factory):
    """Two runs of one architecture."""
    other = tmp_path_factory.mktemp("sources") / "keep"
    fit(other, game="keep")
    return [str(whole), str(other)]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "hub", "k": 1, "pathway_noise": "all"},  # torch's own generator draws, too
        {"method": "knowledge-flow"},  # whose losses hang on the step and on the update before
        {"method": "zoo-tuning"},
    ],
    ids=lambda changes: changes["method"],
)
def test_every_method_goes_on_to_the_same_bits(sources, tmp_path, monkeypatch, changes):
    changes = {"game": "medley", "hub": sources, "steps": 34, "save_every": 13} | changes
    fit(tmp_path / "whole", **changes)
    step = Agent.step

    def crash(self):
        if self.progress.step == 30:
            raise MemoryError
        step(self)

    monkeypatch.setattr(Agent, "step", crash)
    with pytest.raises(MemoryError):
        fit(tmp_path / "run", **changes)
    monkeypatch.undo()
    torch.manual_seed(12345)
    fit(tmp_path / "run", resume=True, **changes)
    assert differences(tmp_path / "whole", tmp_path / "run") == []
