"""``hubpath fit --seeds 0,1,2``: the same run with several seeds, and what they say together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..fields import differences
from ..locks import locked
from ..runs.build import kind_of_task
from ..runs.config import FitConfig
from ..runs.folder import RunFolder
from ..runs.pays_words import routing_of_seeds
from ..runs.places import check_apart, check_not_taken
from ..written import LANDMARKS, RUN, SEEDS
from .fit import fit

NOT_SPREAD = ("test_images", "test_is_validation", "best_step")  # of what a run's result has


def fit_seeds(
    config: FitConfig,
    seeds: Sequence[int],
    out_dir: str | Path,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs ``fit`` once a seed, in ``out_dir/seed-S``, and writes ``out_dir/result.json``.

    It holds the seeds' own results and, of each accuracy and loss, mean and standard deviation (of
    a sample: n - 1). Each seed decides for itself what ``fallback`` keeps. Where ``resume`` is
    true, a seed that is done is not run again, but for that decision where ``fallback`` is another
    now, and one that was cut short goes on. All draw what they hold out from the same images, those
    that the first seed found.

    Returns the contents of ``result.json``; empty if a signal stopped a run.

    Raises ValueError, before any training, if runs are there and ``resume`` is false, or are of
    other settings.
    """
    console = console or Console()
    check_apart(out_dir, config.dataset, config.data)  # before there is a lock in it
    check_not_taken(out_dir, RUN, LANDMARKS, SEEDS)
    with locked(out_dir, console=console):
        return _fit_seeds(config, seeds, RunFolder(Path(out_dir)), resume, console)


def _fit_seeds(
    config: FitConfig, seeds: Sequence[int], folder: RunFolder, resume: bool, console: Console
) -> dict[str, Any]:
    _check_folder(config, seeds, folder, resume)
    folder.write_seeds(config, seeds)
    if not any(folder.seed(seed).has_run for seed in seeds):
        folder.write_files(None)  # of a run that was deleted
    results = []
    for i, seed in enumerate(seeds, start=1):
        run = folder.seed(seed)
        summary = run.result()
        if summary is not None and run.record().config.fallback != config.fallback:
            summary = None  # trained, but it is to be decided anew what it keeps
        done = "" if summary is None else f" is done: {run.path}"
        console.print(f"[bold]seed {seed}[/] ({i} of {len(seeds)}){done}", soft_wrap=True)
        if summary is None:
            result, summary = fit(
                config.with_seed(seed), run.path, resume, console, folder.path, folder.files
            )
            if result.interrupted:
                return {}
        results.append(summary)
    summary = summarise(seeds, results)
    folder.write_result(summary)
    measure = kind_of_task(config).metric
    for line in routing_of_seeds(seeds, results, measure):
        console.print(escape(line), soft_wrap=True, highlight=False)
    for name, spread in summary.items():
        if name.startswith("test_"):
            console.print(
                f"[bold]{name}: {spread['mean']:.4f} ± {spread['std']:.4f}[/] (mean and standard "
                f"deviation of seeds {', '.join(map(str, seeds))})",
                soft_wrap=True,
            )
    return summary


def summarise(seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of what every seed has; of a single seed the deviation is 0."""
    spread = {}
    for name in results[0]:
        if name in NOT_SPREAD or not name.startswith(("test_", "best_")):
            continue
        values = [result.get(name) for result in results]
        if any(value is None for value in values):  # nothing was held out
            continue
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        spread[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return {"seeds": list(seeds), **spread, "runs": list(results)}


def _check_folder(config: FitConfig, seeds: Sequence[int], folder: RunFolder, resume: bool) -> None:
    if folder.has_run:
        raise ValueError(f"out: {folder.path} holds a run of one seed; choose another folder")
    there = folder.seeds()[1] if folder.has_seeds else ()
    held = {s: run for s in dict.fromkeys((*seeds, *there)) if (run := folder.seed(s)).has_run}
    if held and not resume:
        names = ", ".join(run.path.name for run in held.values())
        raise ValueError(
            f"out: {folder.path} holds runs of these seeds ({names}); go on with them by --resume, "
            "delete them, or choose another folder"
        )
    for seed, run in held.items():
        saved, asked = run.record().config, config.with_seed(seed)
        changed = differences(saved.identity(), asked.settled(saved).identity())
        if changed:
            raise ValueError(
                f"{run.path} is a run of other settings ({'; '.join(changed)}); use the same to "
                "resume, or another folder"
            )
