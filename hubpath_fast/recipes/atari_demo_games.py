"""Games of the medley played by a finished policy: scores game by game, and who was asked when."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ..files import write_bytes, write_json
from ..tasks.atari.play import Moment, play_episodes
from ..tasks.atari.policy import Policy
from ..tasks.atari.small_games import GAMES, Medley, make_small_game
from ..tasks.atari.sources import open_run

PLAYED, MOMENTS = "played.json", "moments.safetensors"
SHOWN = (5, 15, 25)  # steps of each game's first long episode whose boards are kept
NAMES = tuple(game.name for game in GAMES)


@dataclass(frozen=True)
class Played:
    """games, scores: of each episode. weights: by game, the mean weight of each expert over all
    steps, 0 where it was not asked; None of a single network."""

    games: list[str]
    scores: list[float]
    weights: dict[str, list[float]] | None

    def of(self, name: str) -> np.ndarray:
        """The scores of a game's episodes."""
        pairs = zip(self.games, self.scores, strict=True)
        return np.array([score for game, score in pairs if game == name])

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


class _Watch:
    """Notes, while games are played, which game it is, whom the policy asks, and some boards."""

    def __init__(self, policy: Policy | None):
        self.asks = getattr(policy, "expert_weights", None)
        self.games: dict[int, str] = {}
        self.weights: dict[str, list[Tensor]] = defaultdict(list)
        self.boards: dict[tuple[int, int], tuple[np.ndarray, Tensor]] = {}

    def __call__(self, moment: Moment) -> None:
        name = self.games.setdefault(moment.episode, moment.info["game"])
        if self.asks is None:
            return
        weights = self.asks(moment.states)[0].cpu()
        self.weights[name].append(weights)
        if moment.step in SHOWN:
            self.boards[moment.episode, moment.step] = moment.screen, weights

    def means(self) -> dict[str, list[float]] | None:
        if self.asks is None:
            return None
        found = ((name, self.weights[name]) for name in NAMES if name in self.weights)
        return {name: torch.stack(weights).double().mean(dim=0).tolist() for name, weights in found}

    def moments(self) -> dict[str, Tensor]:
        """Of each game's first episode that was long enough: "boards" uint8 [n, 3, h, w], "weights"
        [n, M], "games" [n], numbers in NAMES."""
        boards, weights, games = [], [], []
        for number, name in enumerate(NAMES):
            own = (e for e, game in self.games.items() if game == name)
            whole = (e for e in own if all((e, step) in self.boards for step in SHOWN))
            for episode in list(whole)[:1]:
                for step in SHOWN:
                    board, weight = self.boards[episode, step]
                    boards.append(torch.from_numpy(board.transpose(2, 0, 1).copy()))
                    weights.append(weight)
                    games.append(number)
        if not boards:
            return {}
        return {
            "boards": torch.stack(boards), "weights": torch.stack(weights),
            "games": torch.tensor(games),
        }  # fmt: skip


def play_medley(folder: Path | None, episodes: int, seed: int, device: str = "cpu") -> Played:
    """Plays the medley with the policy of a run's folder, and notes there what came of it.

    The games and their order depend on the seed alone: episode i is the same game whoever plays.
    folder: None for actions drawn at random; nothing is written then.
    """
    policy = None if folder is None else open_run(folder, device)[0]
    # Of no run's training, which takes the seed itself.
    env_seed, draws = map(int, np.random.SeedSequence([seed, len(NAMES)]).generate_state(2))
    env = make_small_game(Medley.name, env_seed)
    watch = _Watch(policy)
    generator = torch.Generator().manual_seed(draws)
    found = play_episodes(policy, env, episodes, generator, on_step=watch)
    games = [watch.games[episode] for episode in range(episodes)]
    played = Played(games, [episode.score for episode in found], watch.means())
    if folder is not None:
        if moments := watch.moments():
            write_bytes(folder / MOMENTS, save(moments))
        write_json(folder / PLAYED, asdict(played))  # last: it says that all is done
    return played


def read_played(folder: Path) -> Played | None:
    """What ``play_medley`` noted; None where it did not, or damaged."""
    try:
        held: dict[str, Any] = json.loads((folder / PLAYED).read_text(encoding="utf-8"))
        return Played(**held)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def read_moments(folder: Path) -> dict[str, Tensor]:
    """See ``_Watch.moments``; empty where there are none."""
    path = folder / MOMENTS
    return load(path.read_bytes()) if path.is_file() else {}
