"""``hubpath atari pretrain`` and ``fit``: a game in, a policy out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..checkpoints import find_checkpoint
from ..devices import check_device, flushed_denormals
from ..files import write_json
from ..locks import locked
from ..runs.places import check_not_taken
from ..tasks.atari.agent import Agent, Result
from ..tasks.atari.comparison import RESULT, title_of
from ..tasks.atari.open_game import about, open_game
from ..tasks.atari.policies import make_policy
from ..tasks.atari.settings import HUB, SCRATCH, AtariSettings
from ..tasks.atari.sources import LAST, open_sources, read_record
from ..training.random_state import seed_all
from ..written import GAME


def fit_atari(
    settings: AtariSettings,
    out_dir: str | Path,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Learns a game, plays the final evaluation and writes ``result.json``; returns its contents.

    None: a signal stopped the run, which has saved.

    Raises ValueError for anything wrong with the game, the sources or the folder, before the first
    step; NonFiniteLoss; OSError where something cannot be written.
    """
    console, out_dir = console or Console(), Path(out_dir)
    check_device(settings.device)
    check_not_taken(out_dir, GAME)
    # Adam's averages of units that are never used become denormal.
    with locked(out_dir, console=console), flushed_denormals():
        return _fit(settings, out_dir, resume, console)


def _fit(
    settings: AtariSettings, out_dir: Path, resume: bool, console: Console
) -> dict[str, Any] | None:
    held = find_checkpoint(out_dir / LAST)
    if held and not resume:
        raise ValueError(
            f"out: {out_dir} holds another run ({held}); go on with it by --resume, delete it, or "
            "choose another"
        )
    env = open_game(settings.game, settings.seed, training=True)
    seed_all(settings.seed)
    networks = read_record(out_dir / LAST).bodies() if held else _networks(settings, env)
    policy = make_policy(settings, networks, env.num_actions).to(settings.device)
    _banner(settings, env, policy, console)
    agent = Agent(
        settings, out_dir, policy, env,
        lambda seed: open_game(settings.game, seed, training=False),
        [network.config() for network in networks], resume, console,
    )  # fmt: skip
    found = agent.fit()
    if found is None:
        return None
    result = _result(settings, found)
    write_json(out_dir / RESULT, result)
    mean = sum(found.scores) / len(found.scores)
    console.print(
        f"{settings.game}: {mean:.1f} points, the mean of {len(found.scores)} games after step "
        f"{settings.steps}; {result['steps_per_second']:.0f} steps/s",
        highlight=False,
    )
    return result


def _networks(settings: AtariSettings, env: Any) -> list[Any]:
    """The sources' networks; from scratch one of the settings' sizes."""
    from ..tasks.atari.network import RainbowNetwork

    if settings.method != SCRATCH:
        return [source.network for source in open_sources(settings, env)]
    return [
        RainbowNetwork(
            env.num_actions, settings.atoms, settings.hidden, env.history, env.frame_shape,
            settings.patches, settings.widths, settings.noise_std,
        )
    ]  # fmt: skip


def _result(settings: AtariSettings, found: Result) -> dict[str, Any]:
    progress = found.progress
    sources = [Path(folder).name for folder in settings.hub]
    return {
        "method": settings.method,
        "title": title_of(settings.method, sources, settings.k),
        "game": settings.game,
        "sources": sources,
        "seed": settings.seed,
        "steps": settings.steps,
        "learn_start": settings.learn_start,
        "k": settings.k if settings.method == HUB else None,
        "heads": settings.heads if sources else None,
        "scores": found.scores,
        "episode_steps": found.episode_steps,
        "curve": progress.curve,
        "seconds": progress.seconds,
        "steps_per_second": progress.step / max(progress.seconds, 1e-9),
    }


def _banner(settings: AtariSettings, env: Any, policy: torch.nn.Module, console: Console) -> None:
    """What is run, before it is."""
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    sources = f" from {', '.join(settings.hub)}" if settings.hub else ""
    actions = f"{env.num_actions} actions ({', '.join(env.action_names).lower()})"
    lines = {
        "game": f"{settings.game}: {actions}; {about(settings.game)}",
        "policy": f"{settings.method}{sources}, {millions:.2f} M parameters",
        "run": f"{settings.steps} steps, updates from step {settings.learn_start} on, "
        f"{settings.n_step}-step returns, batches of {settings.batch_size}, rate {settings.lr:g}, "
        f"seed {settings.seed}, on {settings.device}",
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:<7}[/]{text}", soft_wrap=True, highlight=False)
