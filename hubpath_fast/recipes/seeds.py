"""``hubpath fit --seeds 0,1,2``: the same run with several seeds, and what they say together."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..files import write_json
from ..runs.config import FREE, FitConfig
from ..runs.resolve import FIT_FILE, read_record, write_seeds
from .fit import RESULT_FILE, fit

SPREAD = ("test_accuracy", "test_loss", "best_validation")


def fit_seeds(
    config: FitConfig,
    seeds: Sequence[int],
    out_dir: str | Path,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs ``fit`` once a seed, in ``out_dir/seed-S``, and writes ``out_dir/result.json``.

    It holds the seeds' own results and, of each accuracy and loss, mean and standard deviation (of
    a sample: n - 1). Where ``resume`` is true, a seed that is done is not run again, and one that
    was cut short goes on.

    Returns the contents of ``result.json``; empty if a signal stopped a run.

    Raises ValueError, before any training, if runs are there and ``resume`` is false, or are of
    other settings.
    """
    console, out_dir = console or Console(), Path(out_dir)
    _check_folder(config, seeds, out_dir, resume)
    write_seeds(out_dir, config, seeds)
    results = []
    for i, seed in enumerate(seeds, start=1):
        run, own = out_dir / f"seed-{seed}", _with_seed(config, seed)
        done = run / RESULT_FILE
        if done.is_file():
            console.print(f"[bold]seed {seed}[/] ({i} of {len(seeds)}) is done: {done}")
            results.append(json.loads(done.read_text(encoding="utf-8")))
            continue
        console.print(f"[bold]seed {seed}[/] ({i} of {len(seeds)})")
        result, summary = fit(own, run, resume, console)
        if result.interrupted:
            return {}
        results.append(summary)
    summary = summarise(seeds, results)
    write_json(out_dir / RESULT_FILE, summary)
    for name, text in (("test_accuracy", "test"), *_crop_names(summary)):
        mean, std = 100 * summary[name]["mean"], 100 * summary[name]["std"]
        console.print(
            f"[bold]{text}: {mean:.2f} ± {std:.2f} %[/] (mean and standard deviation of seeds "
            f"{', '.join(map(str, seeds))})",
            soft_wrap=True,
        )
    return summary


def summarise(seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of what every seed has; of a single seed the deviation is 0."""
    names = [*SPREAD, *(name for name in results[0] if name.endswith("_crops"))]
    spread = {}
    for name in names:
        values = [result[name] for result in results]
        if any(value is None for value in values):  # nothing was held out
            continue
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        spread[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return {"seeds": list(seeds), **spread, "runs": list(results)}


def _crop_names(summary: dict[str, Any]) -> list[tuple[str, str]]:
    names = [name for name in summary if name.endswith("_crops")]
    return [(name, f"test, {name.split('_')[-2]} crops") for name in names]


def _with_seed(config: FitConfig, seed: int) -> FitConfig:
    return dataclasses.replace(config, trainer=config.trainer.replace(seed=seed))


def _check_folder(config: FitConfig, seeds: Sequence[int], out_dir: Path, resume: bool) -> None:
    if (out_dir / FIT_FILE).is_file():
        raise ValueError(f"out: {out_dir} holds a run of one seed; choose another folder")
    held = [run for seed in seeds if (run := out_dir / f"seed-{seed}").joinpath(FIT_FILE).is_file()]
    if held and not resume:
        raise ValueError(
            f"out: {out_dir} holds runs of these seeds ({', '.join(run.name for run in held)}); go "
            "on with them by --resume, delete them, or choose another folder"
        )
    for run in held:
        saved = FitConfig.from_dict(read_record(run)["config"]).to_dict()
        asked = _with_seed(config, saved["trainer"]["seed"]).to_dict()
        changed = [k for k in asked if k not in FREE and _plain(asked[k]) != _plain(saved[k])]
        if changed:
            raise ValueError(
                f"{run} is a run of other settings ({', '.join(changed)}); use the same to resume, "
                "or another folder"
            )


def _plain(value: Any) -> Any:
    """A setting without what may differ inside of the trainer's."""
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k not in ("device", "log_every", "save_every")}
    return value
