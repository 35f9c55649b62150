"""What runs left behind: results, chosen rates and held-out predictions of one seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..measure import Measure
from ..runs.build import saved_task
from ..training import Task
from .settings import PROBLEM, CompareSettings, read_compare

RESULT, OUTPUTS, FAILED = "result.json", "outputs.safetensors", "failed.json"
TARGETS = "targets.safetensors"
COSTS = ("forwards_per_sample", "gflops_per_sample", "milliseconds_per_sample")  # at inference
FILES = "files.csv.gz"  # the images of all seeds, before any are held out; see data.kept


class RunFailed(ValueError):
    """A run that is needed has failed."""


def seed_folder(out_dir: Path, seed: int) -> Path:
    return Path(out_dir) / "runs" / f"seed-{seed}"


def files_of(out_dir: Path) -> Path:
    """Where the list of a comparison's images is, or is to be."""
    return Path(out_dir) / "runs" / FILES


def run_folder(out_dir: Path, seed: int, run: str, rate: float | None) -> Path:
    """rate: where several are tried for this run; else None."""
    return seed_folder(out_dir, seed) / (run if rate is None else f"{run}-lr-{rate:g}")


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file's contents; None where it is missing or damaged (then the run is done again)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


class SeedResults:
    """Finished runs of one seed of a comparison. rates: those tried for every tuned method."""

    def __init__(self, out_dir: str | Path, seed: int, rates: Sequence[float]):
        self.out_dir, self.seed, self.rates = Path(out_dir), seed, tuple(rates)
        self._chosen: dict[str, tuple[Path, dict[str, Any]]] = {}
        self.predictions = lru_cache(maxsize=None)(self._predictions)

    @property
    def problem(self) -> dict[str, Any] | None:
        """What was noted of data and hub; None: not yet."""
        return read(seed_folder(self.out_dir, self.seed) / PROBLEM)

    @property
    def split(self) -> str:
        """What images "test" stands for: see ``Problem.split``."""
        return (self.problem or {}).get("split", "test")

    @cached_property
    def task(self) -> Task:
        settings = CompareSettings.from_dict(read_compare(self.out_dir)["settings"])
        return saved_task(settings.fit, self.problem)

    def targets(self) -> dict[str, Tensor]:
        """ "validation" and "test", and "groups" [n] where test images have some."""
        return load_file(seed_folder(self.out_dir, self.seed) / TARGETS)

    def result(self, run: str) -> dict[str, Any]:
        """Of a run, at its chosen rate: the best of the task's metric on validation data, among
        equals the lowest validation loss, among those the first rate. Raises RunFailed if it failed
        at every rate."""
        return self._choose(run)[1]

    def folder(self, run: str) -> Path:
        """Where the run lies, at its chosen rate."""
        return self._choose(run)[0]

    def best_singles(self) -> list[int]:
        """All experts, the one that is best alone on validation data first."""
        metric = self.task.metric
        results = [self.result(f"single-{i}") for i in range(len(self.problem["experts"]))]
        return metric.ranked([result["validation"][metric.name] for result in results])

    def _predictions(self, run: str) -> dict[str, Tensor]:
        """ "validation" and "test", float32 [n, P]; of the test images also, of pathways, "weights"
        [n, M], 0 where an expert is inactive, and, where a task is judged by errors, "errors" [n]
        float64."""
        return load_file(self.folder(run) / OUTPUTS)

    def _choose(self, run: str) -> tuple[Path, dict[str, Any]]:
        if run not in self._chosen:
            folders = [run_folder(self.out_dir, self.seed, run, r) for r in (None, *self.rates)]
            done = [(folder, r) for folder in folders if (r := read(folder / RESULT)) is not None]
            if not done:
                reasons = [f["error"] for folder in folders if (f := read(folder / FAILED))]
                raise RunFailed(f"{run} failed: {reasons[0]}" if reasons else f"{run} is not done")
            metric = self.task.metric
            values = [result["validation"][metric.name] for _, result in done]
            best = metric.best(values)
            equal = [d for d, v in zip(done, values, strict=True) if v == best] or done
            losses = [result["validation"]["loss"] for _, result in equal]
            self._chosen[run] = equal[Measure("loss", "min").ranked(losses)[0]]
        return self._chosen[run]
