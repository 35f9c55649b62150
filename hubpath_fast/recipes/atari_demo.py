"""``hubpath atari demo``: a hub of policies on small games of our own, with no emulator and no GPU.

One policy is trained on each small game; they are the hub. The target is the medley: each episode
is one of the games, with its buttons in another place. It is learned from scratch, by fine-tuning
each of the policies, and by Hub-Pathway, all in the same number of steps. A fine-tuned policy knows
a third of the target; the hub can ask, at each step, the policy of the game that is played.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..compare.digits_hub import expert_store
from ..compare.workers import choose_workers, start_server
from ..files import write_json
from ..locks import LOCK, locked
from .atari_demo_games import play_medley, read_played
from .atari_demo_runs import PRELOAD, SOURCES, TARGET, THREADS, Plan, run_folder, run_missing
from .demo import REPORT, SUMMARY, check_folder, make_room, say_where

DEMO_FILE = "demo.json"
OURS = {SUMMARY, REPORT, DEMO_FILE, "runs", "experts", LOCK}

EPISODES, QUICK_EPISODES = 100, 10
QUICK = {"steps": 300, "learn_start": 100, "eval_every": 100, "eval_episodes": 2}


def atari_demo(
    out_dir: str | Path = "hubpath-atari-demo",
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    console: Console | None = None,
    cache: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs the demo and writes ``summary.json`` and ``report.html`` into ``out_dir``.

    Args:
        out_dir: a new or empty folder, or one of an earlier demo: a finished one is replaced, one
            that was stopped goes on.
        seed: of the games, the weights, the noise and the replay.
        quick: a few hundred steps, to see it work; the figures say little then.
        device: anything torch.device takes.
        console: where progress and the table are shown; None: standard output.
        cache: where the sources are kept; None: the user's cache folder.
        changes: settings of all runs that are not the demo's, or those of ``quick``; None: none.

    Returns:
        The contents of ``summary.json``.

    Raises:
        ValueError: out_dir holds something else.
        OSError: a run failed; the message says why.
        InterruptedError: a signal came; the same command goes on.
    """
    began = time.perf_counter()
    console, out_dir = console or Console(), Path(out_dir)
    count, _ = choose_workers(None, device)
    check_folder(out_dir, OURS)
    start_server(THREADS, PRELOAD)  # imports what runs need, while this process goes on
    cache = expert_store(out_dir) if cache is None else Path(cache)
    episodes = QUICK_EPISODES if quick else EPISODES
    plan = Plan(seed, device, cache, episodes, {**(QUICK if quick else {}), **(changes or {})})
    steps = plan.settings(TARGET).steps
    console.print(
        f"[bold]hubpath atari demo[/]: sources {', '.join(SOURCES)}; target {TARGET}, each episode "
        f"one of them with its buttons permuted; {steps:,} steps each; seed {seed}",
        highlight=False,
        soft_wrap=True,
    )
    with locked(out_dir, "demo", console):
        make_room(out_dir, plan.to_dict(), DEMO_FILE)
        write_json(out_dir / DEMO_FILE, {"settings": plan.to_dict()})
        run_missing(plan, out_dir, count, console)
        # They draw figures: what takes a second to import can wait until here.
        from .atari_demo_report import Demo, summary_of, terminal_table, verdicts, write_report

        runs = {method.name: run_folder(out_dir, method.name) for method in plan.methods}
        finished = Demo(
            seed,
            tuple(plan.methods),
            runs,
            {game: plan.source(game) for game in SOURCES},
            {name: read_played(folder) for name, folder in runs.items()},
            play_medley(None, plan.episodes, seed),
        )
        summary = summary_of(finished, time.perf_counter() - began)
        write_report(out_dir / REPORT, finished, summary)
        write_json(out_dir / SUMMARY, summary)
    console.print(terminal_table(summary))
    for text in verdicts(summary):
        console.print(text, highlight=False, soft_wrap=True)
    say_where(console, summary["seconds"], out_dir)
    return summary
