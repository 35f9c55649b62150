"""Folders of comparisons of games as finished runs leave them, made up, and runs that make them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from hubpath_fast.files import write_json
from hubpath_fast.tasks.atari.comparison import (
    Asked,
    ComparisonSettings,
    methods_of,
    open_comparison,
    run_place,
    source_place,
)

from .waiting import wait_until

SOURCES = ("seaquest", "riverraid")
STEPS = 20_000


def asked(
    targets: Sequence[str] = ("gopher",),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    **settings,
) -> Asked:
    """methods: by name; None: all."""
    made = ComparisonSettings(
        **{"sources": SOURCES, "steps": STEPS, "source_steps": STEPS, "episodes": 4, **settings}
    )
    names = tuple(m.name for m in methods_of(made.sources, made.k)) if methods is None else methods
    return Asked(made, tuple(targets), tuple(names), tuple(seeds))


def write_run(
    folder: Path, score: float, curve: Sequence[Sequence[float]] = (), steps: int = STEPS, **more
) -> Path:
    """A finished run, of whose four games the mean is ``score``."""
    scores = [score - 10, score + 10, score - 3, score + 3]
    write_json(
        folder / "result.json",
        {
            "scores": scores, "episode_steps": [300] * 4, "curve": [list(c) for c in curve],
            "steps": steps, "seconds": 360.0, "steps_per_second": 55.6, **more,
        },
    )  # fmt: skip
    return folder


def write_comparison(
    out_dir: Path, of: Asked, scores: Mapping[tuple[str, str, int], float], points: int = 5
) -> Path:
    """scores: of finished runs by (game, method, seed). Curves rise in ``points`` evaluations from
    half a run's score to all of it."""
    open_comparison(out_dir, of)
    for source in of.needed_sources():
        write_run(out_dir / source_place(source), 100.0, steps=of.settings.source_steps)
    steps = of.settings.steps
    for (game, method, seed), score in scores.items():
        curve = [
            (steps * (i + 1) // points, score * (0.5 + 0.5 * i / max(points - 1, 1)))
            for i in range(points)
        ]
        write_run(out_dir / run_place(game, method, seed), score, curve, steps)
    return out_dir


DIES, FAILS, WAITS = 13, 14, 15  # seeds
LAST = "last"  # in a run's file "attempt": it ends after another of its folder has failed


def quick_fit(settings, out_dir: Path, resume: bool, console):
    """In place of ``fit_atari``: a run that is over at once. The first attempt with the seed DIES
    is killed, with FAILS fails, with WAITS waits for a signal, which the file "waits" tells, and
    then says that it has saved."""
    from hubpath_fast.training import Interrupt

    out_dir.mkdir(parents=True, exist_ok=True)
    attempt = out_dir / "attempt"
    again = attempt.exists()
    if again and attempt.read_text() == LAST:
        wait_until(lambda: any(out_dir.parent.glob("*.failed.json")), "a failed run")
    attempt.write_text(str(os.getpid()))
    console.print(f"{settings.method} on {settings.game}")
    if not again and settings.seed == DIES:
        os.kill(os.getpid(), signal.SIGKILL)
    if not again and settings.seed == FAILS:
        raise ValueError("lr: far too large")
    if not again and settings.seed == WAITS:
        with Interrupt() as interrupt:
            (out_dir / "waits").touch()
            wait_until(lambda: interrupt.requested is not None, "a signal")
        (out_dir / "saved").touch()
        return None
    score = 10.0 * settings.k + settings.seed + len(settings.hub)
    write_run(out_dir, score, [[settings.steps, score]], settings.steps)
    return {}


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
