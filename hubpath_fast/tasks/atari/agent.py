"""A run on a game: play, learn, evaluate, save; and go on, to the bit, where it was killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ...checkpoints import CheckpointError, discard_unfinished, find_checkpoint, load_weights
from ...fields import differences
from ...training import Reporting
from ...training.checkpoint import load_state, save_checkpoint
from ...training.guard import FiniteGuard
from ...training.interrupt import Interrupt
from ...training.log import RunLog
from ...training.random_state import random_state, set_random_state
from ...training.run_state import RunState
from .captured import make_learner
from .learn import Batch, Update
from .patches import FramePatches
from .play import play_episodes
from .policy import Policy
from .replay import PrioritizedReplay
from .replay_files import ReplayFiles
from .settings import AtariSettings
from .sources import LAST, Record, read_record

STREAMS = ("noise", "sampling")  # generators of an agent beside torch's own
REPLAY = "replay"  # folder of a run's stored frames


class Stopped(Exception):
    """A signal came in the middle of an evaluation."""


@dataclass
class Progress:
    """Where a run stands. reported: the last step whose line of the log and evaluation, if it has
    them, are done; score, game_steps: of the game that is played; episodes: finished since the last
    line of the log; curve: [step, mean score] of evaluations; seconds: of steps, without
    evaluations and checkpoints; sums: of the updates since the last line, by name."""

    step: int = 0
    reported: int = 0
    updates: int = 0  # since the last line of the log
    score: float = 0.0
    game_steps: int = 0
    seconds: float = 0.0
    episodes: list[dict[str, Any]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """scores, episode_steps: of the evaluation after the last step."""

    scores: list[float]
    episode_steps: list[int]
    progress: Progress


class Agent:
    """Plays a game and learns it.

    Args:
        settings: of the run.
        out_dir: its folder, which nothing else writes to.
        policy: that learns, on its device.
        env: of training; see ``environments``.
        make_env: seed -> an environment for evaluation, in which whole games are played.
        networks: constructors' arguments of the networks that the policy was made of.
        resume: whether to go on with the folder's run.

    Raises CheckpointError where the folder's run is another, or is damaged.
    """

    def __init__(
        self,
        settings: AtariSettings,
        out_dir: Path,
        policy: Policy,
        env: Any,
        make_env: Callable[[int], Any],
        networks: Sequence[Mapping[str, Any]],
        resume: bool = False,
        console: Console | None = None,
    ):
        self.settings, self.out_dir, self.env, self.make_env = settings, out_dir, env, make_env
        self.console = console or Console()
        self.device = torch.device(settings.device)
        streams = np.random.SeedSequence(settings.seed).generate_state(len(STREAMS))
        self.generators = {
            name: torch.Generator().manual_seed(int(seed))
            for name, seed in zip(STREAMS, streams, strict=True)
        }
        self.learner = make_learner(policy, settings, self.generators["noise"])
        self.guard = FiniteGuard(
            self.learner.modules(), self.learner.optimizer, out_dir, expert_name=str
        )
        self.frames = FramePatches(env.frame_shape, settings.patches)
        self.replay = PrioritizedReplay(
            settings.steps, self.frames.shape, env.history, settings.n_step, settings.gamma,
            settings.exponent,
        )  # fmt: skip
        self.files = ReplayFiles(out_dir / REPLAY)
        self.config = Record(settings, tuple(env.action_names), tuple(networks)).to_dict()
        self.progress, self.obs = Progress(), None
        self._interrupt = Interrupt()
        self.last = out_dir / LAST
        discard_unfinished(self.last)
        if resume and find_checkpoint(self.last):
            self._load()
        else:
            self.obs, _ = env.reset()

    def fit(self) -> Result | None:
        """Plays the steps that are left, then the final evaluation. None: a signal stopped it, and
        what it has is saved."""
        settings, progress = self.settings, self.progress
        state = RunState(step=progress.step, reported=progress.reported)
        log = RunLog(self.out_dir, Reporting(self.console), settings.steps, state)
        try:
            with Interrupt() as interrupt:
                self._interrupt = interrupt
                return self._fit(log)
        except Stopped:
            log.message(f"stopped by {interrupt.requested} at step {progress.step}")
            return None
        finally:
            log.close()

    def _fit(self, log: RunLog) -> Result:
        settings, progress = self.settings, self.progress
        saved, stopped = (progress.step, progress.reported), False
        while True:
            try:
                if progress.reported < progress.step:
                    self._report(log)
                self._stop_if_asked()
            except Stopped:
                stopped = True
            last = progress.step == settings.steps
            place = progress.step, progress.reported
            due = stopped or last or progress.step % settings.save_every == 0
            if due and place != saved:
                self.save(log)
                saved = place
            if stopped:
                raise Stopped
            if last:
                break
            began = time.perf_counter()
            self.step()
            progress.seconds += time.perf_counter() - began
            while self.learner.notes:
                log.message(self.learner.notes.pop(0))
            log.advance(progress.step)
        episodes = self.evaluate(settings.final_episodes, final=True)
        scores = [float(episode.score) for episode in episodes]
        return Result(scores, [episode.steps for episode in episodes], progress)

    def _stop_if_asked(self) -> None:
        if self._interrupt.requested:
            raise Stopped

    def step(self) -> None:
        """One step of the game, then one update."""
        settings, progress, learner = self.settings, self.progress, self.learner
        learner.new_noise()
        packed = self.frames.pack(self.obs)
        action = learner.act(torch.from_numpy(packed)[None])
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.replay.add(
            packed[-1],
            action,
            min(max(reward, -1.0), 1.0),
            terminated or info["life_lost"],
            truncated,
            self.frames.pack(obs[-1]) if truncated else None,
        )
        progress.step += 1
        progress.score += reward
        progress.game_steps += 1
        if terminated or truncated:
            done = {"step": progress.step, "score": progress.score, "steps": progress.game_steps}
            progress.episodes.append(done)
            progress.score, progress.game_steps = 0.0, 0
            obs, _ = self.env.reset()
        self.obs = obs
        if progress.step >= settings.learn_start:
            self._update()
        if progress.step % settings.target_every == 0:
            learner.copy_to_target()

    def _update(self) -> None:
        settings, progress = self.settings, self.progress
        learning = settings.steps - settings.learn_start
        done = (progress.step - settings.learn_start) / learning
        beta = settings.beta + (1 - settings.beta) * done
        found = self.replay.sample(settings.batch_size, beta, self.generators["sampling"])
        batch = Batch(*(getattr(found, name) for name in Batch._fields))
        if hasattr(self.learner.policy, "set_progress"):
            self.learner.policy.set_progress(progress.step - settings.learn_start, learning)
        update = self.learner.update(batch)
        task, norm = update.losses.task.cpu(), update.norm.cpu()
        if not bool(torch.isfinite(task).all() and torch.isfinite(norm)):
            step, losses = progress.step, update.losses
            terms = {"loss": float(losses.total), "grad_norm": float(update.norm)}
            text = f"the loss of step {step} or its gradient is not finite"
            raise self.guard.non_finite(text, step, terms)
        self.replay.update(found.indices, task)
        self._add(update)

    def _add(self, update: Update) -> None:
        """To the sums that the next line of the log is the mean of."""
        losses, norm, sums = update.losses, update.norm, self.progress.sums
        values = {
            "loss": losses.total, "task": losses.task.mean(), **losses.terms, "grad_norm": norm,
            "clipped": (norm > self.settings.clip_norm),
        }  # fmt: skip
        for name, value in values.items():
            value = value.double()  # a sum that was loaded is on the CPU
            sums[name] = sums[name].to(value.device) + value if name in sums else value
        self.progress.updates += 1

    def _report(self, log: RunLog) -> None:
        """An evaluation and a line of the log, where the step is one for it."""
        settings, progress = self.settings, self.progress
        last, evaluated = progress.step == settings.steps, []
        if settings.eval_episodes and (progress.step % settings.eval_every == 0 or last):
            # Before anything is written: a signal in between leaves this step to be reported.
            evaluated = [episode.score for episode in self.evaluate(settings.eval_episodes)]
        if progress.step % settings.log_every == 0 or last:
            means = {
                name: (value / progress.updates).tolist() for name, value in progress.sums.items()
            }
            record = {"step": progress.step, **means, "episodes": progress.episodes}
            if progress.episodes:
                record["score"] = float(np.mean([done["score"] for done in progress.episodes]))
            log.write(record, ("score", "task"))
            progress.sums, progress.episodes, progress.updates = {}, [], 0
        if evaluated:
            progress.curve.append([progress.step, float(np.mean(evaluated))])
            log.write({"step": progress.step, "evaluation": evaluated}, ())
            mean = f"{np.mean(evaluated):.1f} points, the mean of {len(evaluated)} games"
            log.message(f"step {progress.step}: {mean}")
        progress.reported = progress.step

    def evaluate(self, episodes: int, final: bool = False) -> list[Any]:
        """Whole games by the policy as it is, in an environment of their own, whose seed depends on
        nothing but the run's and the step."""
        place = [self.settings.seed, self.progress.step, int(final)]
        env_seed, seed = map(int, np.random.SeedSequence(place).generate_state(2))
        generator = torch.Generator().manual_seed(seed)
        return play_episodes(
            self.learner.policy, self.make_env(env_seed), episodes, generator,
            check=self._stop_if_asked,
        )  # fmt: skip

    def save(self, log: RunLog) -> None:
        """The checkpoint: the frames first, then all that refers to them.

        Raises NonFiniteLoss where a weight or an average of Adam's is not finite.
        """
        self.guard.check_state(self.progress.step)
        log.sync()
        steps = self.files.save(self.replay)
        progress = vars(self.progress) | {"episodes": list(self.progress.episodes)}
        state = {
            "progress": progress,
            "optimizer": self.learner.optimizer.state_dict(),
            "replay": steps,
            "env": self.env.state_dict(),
            "obs": torch.from_numpy(np.ascontiguousarray(self.obs)),
            "random": random_state(self.device),
            "generators": {name: made.get_state() for name, made in self.generators.items()},
        }
        save_checkpoint(self.last, self.learner.modules(), state, self.config)
        self.files.tidy(steps)

    def _load(self) -> None:
        """Goes on with the folder's checkpoint."""
        settings = read_record(self.last).settings
        found = differences(settings.identity(), self.settings.identity())
        if found:
            raise CheckpointError(
                f"{self.last} is of another run ({'; '.join(found)}); use the same settings to "
                "resume, or another --out"
            )
        state = load_state(self.last)
        load_weights(self.learner.modules(), self.last)
        try:
            self.learner.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
            self.obs = state["obs"].numpy()
            self.env.load_state_dict(state["env"])
            for name, made in self.generators.items():
                made.set_state(state["generators"][name])
            self.files.load(self.replay, state["replay"])
            set_random_state(state["random"], self.device)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.last} cannot be resumed from: {error!r}") from error
