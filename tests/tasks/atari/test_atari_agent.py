"""A run from its first step to its result, on a small game: log, checkpoint, resume, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from hubpath_fast.checkpoints import CheckpointError
from hubpath_fast.recipes.atari_fit import fit_atari
from hubpath_fast.recipes.atari_settings import read_settings
from hubpath_fast.tasks.atari.agent import Agent
from hubpath_fast.tasks.atari.open_game import open_game
from hubpath_fast.tasks.atari.sources import open_run, open_sources
from hubpath_fast.training import NonFiniteLoss
from hubpath_fast.training.checkpoint import load_state

QUIET = Console(quiet=True)
SHORT = {
    "game": "catch", "method": "scratch", "steps": 140, "learn_start": 60, "batch_size": 8,
    "hidden": 8, "atoms": 11, "target_every": 25, "n_step": 5, "log_every": 20, "eval_every": 70,
    "eval_episodes": 2, "final_episodes": 3, "save_every": 50,
}  # fmt: skip


def settings(**changes):
    return read_settings({**SHORT, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atari") / "catch"
    return folder, fit_atari(settings(), folder, console=QUIET)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_says_what_came_of_it(run):
    folder, result = run
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["method"], result["game"], result["steps"]) == ("scratch", "catch", 140)
    assert len(result["scores"]) == len(result["episode_steps"]) == 3
    assert [step for step, _ in result["curve"]] == [70, 140]
    means = [sum(line["evaluation"]) / 2 for line in lines(folder) if "evaluation" in line]
    assert [mean for _, mean in result["curve"]] == pytest.approx(means)


def test_the_log_has_the_losses_and_games_of_its_steps(run):
    folder, _ = run
    training = [line for line in lines(folder) if "evaluation" not in line]
    assert [line["step"] for line in training] == list(range(20, 141, 20))
    assert ["loss" in line for line in training] == [False, False, True, True, True, True, True]
    games = [game for line in training for game in line["episodes"]]
    assert [game["step"] for game in games] == sorted(game["step"] for game in games)
    # Every step belongs to the game that ended with it, or to the one that is still played.
    assert sum(game["steps"] for game in games) <= 140
    assert games[0]["steps"] == games[0]["step"]


def test_the_last_checkpoint_is_the_policy_that_was_scored(run):
    folder, result = run
    policy, record = open_run(folder)
    assert record.settings == settings()
    assert not policy.training
    agent = Agent(
        record.settings, folder, policy, open_game("catch", 0, training=True),
        lambda seed: open_game("catch", seed, training=False), record.networks,
        resume=True, console=QUIET,
    )  # fmt: skip
    again = agent.evaluate(3, final=True)
    assert [episode.score for episode in again] == result["scores"]


def test_a_run_without_its_result_is_only_scored_again(run, tmp_path):
    folder, result = run
    (folder / "result.json").unlink()
    before = (folder / "log.jsonl").read_text()
    again = fit_atari(settings(), folder, resume=True, console=QUIET)
    assert again == result
    assert (folder / "log.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_ends_the_run_before_priorities_are_written(
    tmp_path, monkeypatch
):
    from hubpath_fast.tasks.atari.replay import PrioritizedReplay

    folder, step, updated = tmp_path / "run", Agent.step, []
    update = PrioritizedReplay.update

    def spoil(self):
        if self.progress.step == 80:
            with torch.no_grad():
                next(self.learner.policy.parameters()).fill_(torch.nan)
        step(self)

    def watch(self, indices, losses):
        updated.append(bool(torch.isfinite(losses).all()))
        update(self, indices, losses)

    monkeypatch.setattr(Agent, "step", spoil)
    monkeypatch.setattr(PrioritizedReplay, "update", watch)
    with pytest.raises(
        NonFiniteLoss, match=r"step 81 or its gradient is not finite; the last good"
    ):
        fit_atari(settings(), folder, console=QUIET)
    assert updated
    assert all(updated)
    assert load_state(folder / "last")["progress"]["step"] == 50


def test_denormals_are_zero_in_a_run_and_not_in_the_process_after_it(tmp_path, monkeypatch):
    def least():
        return (torch.tensor([1 << 22], dtype=torch.int32).view(torch.float32) * 1).item()

    def stop(self):
        found.append(least())

    found = []
    monkeypatch.setattr(Agent, "fit", stop)
    assert fit_atari(settings(), tmp_path / "run", console=QUIET) is None
    assert [*found, least()] == [0, 2.0**-127]


def test_a_gradient_that_is_not_finite_is_in_no_checkpoint(tmp_path, monkeypatch):
    folder, save = tmp_path / "run", Agent.save

    def spoil(self, log):
        if self.progress.step == 100:  # as a step does whose loss is finite and gradient is not
            with torch.no_grad():
                next(self.learner.policy.parameters()).view(-1)[0] = torch.nan
        save(self, log)

    monkeypatch.setattr(Agent, "save", spoil)
    with pytest.raises(NonFiniteLoss, match="a parameter is not finite after step 100"):
        fit_atari(settings(), folder, console=QUIET)
    assert load_state(folder / "last")["progress"]["step"] == 50


def test_a_kept_head_plays_as_its_source_does(run, tmp_path):
    folder, _ = run
    kept = settings(method="finetune", hub=[str(folder)], heads="keep", seed=3, steps=61)
    out = tmp_path / "kept"
    assert fit_atari(kept, out, console=QUIET)["heads"] == "keep"
    (source, _), (tuned, _) = open_run(folder), open_run(out)
    states = torch.randint(0, 256, (4, 2, 20, 20), dtype=torch.uint8)
    away = (tuned(states) - source(states)).abs().max()
    assert away < 0.05  # two updates at a rate of 2.5e-4 from it; a new head is 0.3 away


@pytest.mark.parametrize(
    ("game", "changes", "message"),
    [
        ("catch", {"v_max": 5.0}, "expected v_max 5.0 as this run has, got a source with 10.0"),
        ("catch", {"atoms": 13}, "expected atoms 13 as this run has, got a source with 11"),
        ("medley", {}, None),
    ],
)
def test_kept_heads_are_held_against_the_run(run, tmp_path, game, changes, message):
    folder, _ = run
    asked = settings(game=game, method="finetune", hub=[str(folder)], heads="keep", **changes)
    env = open_game(game, 0, training=True)
    if message is None:
        env.action_names = ("other", *env.action_names[1:])
        message = r"its head is of the actions of catch \(6\)"
    with pytest.raises(ValueError, match=message):
        open_sources(asked, env)


def test_a_source_is_tuned_and_its_head_is_new(run, tmp_path):
    folder, _ = run
    result = fit_atari(
        settings(method="finetune", hub=[str(folder)], seed=3, steps=70),
        tmp_path / "tuned", console=QUIET,
    )  # fmt: skip
    assert (result["sources"], result["heads"]) == (["catch"], "new")
    assert result["title"] == "fine-tuned from catch"
    assert open_run(tmp_path / "tuned")[1].settings.hub == (str(folder),)


def test_what_cannot_be_done_is_said(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match=r"holds another run .*--resume"):
        fit_atari(settings(), folder, console=QUIET)
    with pytest.raises(CheckpointError, match=r"another run \(steps: 140 there, 150 now\)"):
        fit_atari(settings(steps=150), folder, resume=True, console=QUIET)
    with pytest.raises(CheckpointError, match=r"nowhere holds no run .*no such folder"):
        open_run(tmp_path / "nowhere")
    small = settings(method="finetune", hub=[str(folder)], hidden=16)
    with pytest.raises(ValueError, match="expected hidden 16 as this run has, got a source with 8"):
        fit_atari(small, tmp_path / "other", console=QUIET)
    assert not (tmp_path / "other").exists()
    (tmp_path / "images" / "last").mkdir(parents=True)
    (tmp_path / "images" / "last" / "config.json").write_text("{}")  # as of `hubpath fit`
    for go_on in (
        lambda: fit_atari(settings(), tmp_path / "images", resume=True, console=QUIET),
        lambda: open_run(tmp_path / "images"),
    ):
        with pytest.raises(CheckpointError, match="is not of a run of `hubpath atari`"):
            go_on()


def test_two_runs_of_a_seed_are_equal_and_of_two_are_not(run, tmp_path):
    whole, _ = run
    for seed, equal in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        fit_atari(settings(seed=seed), folder, console=QUIET)
        model = "last/model.safetensors"
        assert ((folder / model).read_bytes() == (whole / model).read_bytes()) is equal
