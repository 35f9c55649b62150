"""``hubpath atari evaluate``: what a run's policy, or random play, scores in whole games."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import CheckpointError, find_checkpoint
from ..devices import check_device
from ..tasks.atari.games import SCORES, human_normalized, reference_scores
from ..tasks.atari.open_game import known_game, open_game
from ..tasks.atari.play import EPSILON, Episode, play_episodes
from ..tasks.atari.policy import Policy
from ..tasks.atari.sources import LAST, open_run
from ..tasks.atari.statistics import bootstrap
from ..tasks.atari.video import VIDEO_ENDINGS, Video
from ..training.checkpoint import load_state

EVALUATION = "evaluation.json"
RANDOM = "random"


@dataclass(frozen=True)
class Player:
    """Who plays. title: in words; step: of its training, None for random play; experts: names of
    the sources."""

    policy: Policy | None
    game: str
    method: str
    title: str
    step: int | None
    experts: tuple[str, ...] = ()


def open_player(run: str | Path | None, random: str | None, device: str = "cpu") -> Player:
    """The policy of a run's last checkpoint, or random play of a game.

    Raises ValueError unless one of the two is given, for unknown games, and where the folder holds
    no run or a damaged one.
    """
    if (run is None) == (random is None):
        given = "both" if run is not None else "neither"
        raise ValueError(f"expected the folder of a run, or --random GAME, got {given}")
    check_device(device)
    if random is not None:
        return Player(None, known_game(random)[0], RANDOM, "random play", None)
    policy, record = open_run(run, device)
    settings = record.settings
    step = _step_of(find_checkpoint(Path(run) / LAST))
    sources = tuple(Path(folder).name for folder in settings.hub)
    title = " of ".join(filter(None, (settings.method, ", ".join(sources)))) + ", "
    title += f"{step} of {settings.steps} steps" if step < settings.steps else f"{step} steps"
    return Player(policy, settings.game, settings.method, title, step, sources)


def _step_of(checkpoint: Path) -> int:
    try:
        return int(load_state(checkpoint)["progress"]["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} does not say its step: {error!r}") from error


def evaluate_atari(
    player: Player,
    episodes: int = 100,
    seed: int = 0,
    epsilon: float = EPSILON,
    video: str | Path | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> dict[str, Any]:
    """Plays whole games, and says what they scored.

    Args:
        seed: of the games and of the actions that are drawn.
        video: the first game is drawn to this file, a .gif.
        on_episode: is called after each game.

    Returns:
        "game", "method", "title", "step", "episodes", "seed", "epsilon"; "scores" and
        "episode_steps" of the games, "truncated": how many were stopped by the limit of steps;
        "mean", "sd" (of single games), "median", "interval": 95 % of the mean by bootstrap, None of
        one game; "human_normalized" with "human" and "random", None where those are not known;
        "notes".

    Raises ValueError for wrong arguments; OSError where the video cannot be written.
    """
    _check(episodes, seed, video)
    env_seed, own = map(int, np.random.SeedSequence(seed).generate_state(2))
    env = open_game(player.game, env_seed, training=False)
    generator = torch.Generator().manual_seed(own)
    recorder = None
    if video is not None:
        title = f"{player.game}, {player.title}"
        recorder = Video(player.policy, title, env.action_names, player.experts)
    found = []
    for episode in range(episodes):
        on_step = recorder if episode == 0 else None
        found += play_episodes(player.policy, env, 1, generator, epsilon, on_step=on_step)
        if episode == 0 and recorder is not None:
            recorder.save(video)
        if on_episode is not None:
            on_episode(found[-1])
    result = _summary(player, found) | {"seed": seed, "epsilon": epsilon}
    result["notes"] += [] if recorder is None else recorder.notes
    return result


def _check(episodes: int, seed: int, video: str | Path | None) -> None:
    for name, value, least in (("episodes", episodes, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if video is not None and Path(video).suffix.lower() not in VIDEO_ENDINGS:
        raise ValueError(f"video: expected a name that ends in .gif, got {video}")


def _summary(player: Player, found: list[Episode]) -> dict[str, Any]:
    scores = [episode.score for episode in found]
    mean, low, high = bootstrap([scores])
    known = SCORES.get(player.game)
    truncated = sum(episode.truncated for episode in found)
    notes = []
    if truncated:
        notes.append(f"{truncated} of {len(found)} games were stopped by the limit of steps")
    if len(found) == 1:
        notes.append("one game has no interval")
    return {
        "game": player.game,
        "method": player.method,
        "title": player.title,
        "step": player.step,
        "episodes": len(found),
        "scores": scores,
        "episode_steps": [episode.steps for episode in found],
        "truncated": truncated,
        "mean": mean,
        "sd": float(np.std(scores, ddof=1)) if len(found) > 1 else None,
        "median": float(np.median(scores)),
        "interval": [low, high] if len(found) > 1 else None,
        "human_normalized": human_normalized(mean, player.game) if known else None,
        "human": reference_scores(player.game).human if known else None,
        "random": reference_scores(player.game).random if known else None,
        "notes": notes,
    }


def evaluation_lines(result: dict[str, Any]) -> list[str]:
    """What a terminal shows of them."""
    count, steps = result["episodes"], np.mean(result["episode_steps"])
    lines = [
        f"{result['game']}, {result['title']}: {count} game{'s' * (count > 1)} of {steps:.0f} "
        "steps on average, whole ones, raw scores"
    ]
    spread = ""
    if result["interval"] is not None:
        low, high = result["interval"]
        spread = f" (95 % interval {low:.1f} to {high:.1f}, bootstrap), sd {result['sd']:.1f}"
    lines.append(f"mean {result['mean']:.1f}{spread}, median {result['median']:.1f}")
    if result["human_normalized"] is not None:
        lines.append(
            f"human-normalised {result['human_normalized']:.3f}: 0 is random play "
            f"({result['random']:g}), 1 a human ({result['human']:g})"
        )
    else:
        lines.append(f"no scores of a human and of chance are known of {result['game']}")
    return lines
