"""``hubpath shelf demo``: every command of a shelf once, on 200 models and 1,797 digits.

The models are snapshots along the pre-training of four tiny networks on each of five renderings of
the digits, so that what each is worth is known, and very different. Nothing is downloaded. What a
stopped demo had finished, its commands' files say, and the same command goes on from there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..compare.digits_hub import expert_store
from ..compare.results import read
from ..data import DigitsTask
from ..data.digits import RENDERINGS
from ..files import write_json
from ..locks import LOCK, locked
from ..runs.measure import weights_of
from ..shelf.add import NothingBetter
from ..shelf.digits import (
    NETWORKS,
    NUM_VALIDATION,
    DigitsSnapshots,
    SnapshotSettings,
    digits_splits,
    write_shelf_images,
)
from ..shelf.run import FOLDER as HUB
from ..shelf.run import RESULT, open_hub
from ..shelf.settings import ShelfFitSettings
from .add import ADD
from .demo import REPORT, SUMMARY, check_folder, make_room, say_where
from .prune import PRUNE
from .shelf_add import add
from .shelf_compare import COMPARE, compare
from .shelf_extract import ExtractSettings, extract_shelf, summary
from .shelf_fit import shelf_fit
from .shelf_predict import open_predictor, predict_each, sentence
from .shelf_prune import prune
from .shelf_rank import RANK, rank
from .shelf_snapshots import make_snapshots
from .shelf_unfreeze import unfreeze

RECORD = "demo.json"
SHELF, IMAGES, RUNS = "shelf", "images", "runs"  # folders of a demo
PRUNED, GROWN = "pruned", "grown"  # hubs beside the shelf's own
OURS = {RECORD, SUMMARY, REPORT, SHELF, IMAGES, RUNS, LOCK}
NEWCOMER = "test_convnext"


@dataclass(frozen=True)
class ShelfDemoSettings:
    """What a demo is of. num_validation: of the 300 target digits. newcomer: a network that joins
    the hub at the end, pre-trained on a rendering as the others are."""

    seed: int = 0
    networks: tuple[str, ...] = NETWORKS
    snapshots: SnapshotSettings = field(default_factory=SnapshotSettings)
    num_validation: int = NUM_VALIDATION
    newcomer: str = NEWCOMER
    rendering: str = "checkerboard"
    fit: ShelfFitSettings = field(default_factory=ShelfFitSettings)

    def to_dict(self) -> dict[str, Any]:
        """As it is read from a file again."""
        plain = {**asdict(replace(self, fit=None)), "fit": self.fit.to_dict()}
        return json.loads(json.dumps(plain))


def shelf_demo(
    out_dir: str | Path = "hubpath-shelf-demo",
    seed: int = 0,
    console: Console | None = None,
    settings: ShelfDemoSettings | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Runs the demo and writes ``summary.json`` and ``report.html`` into ``out_dir``.

    Args:
        out_dir: a new or empty folder, or one of an earlier demo: a finished one is replaced, one
            that was stopped goes on.
        seed: of the split, the weights and the order of batches.
        console: where progress is shown; None: standard output.
        settings: None: those of the demo, with this seed.
        cache: where snapshots are kept; None: the user's cache folder.

    Returns the contents of ``summary.json``.

    Raises:
        ValueError: out_dir holds something else.
        InterruptedError: a signal came; the same command goes on.
    """
    began = time.perf_counter()
    console, out_dir = console or Console(), Path(out_dir)
    settings = settings or ShelfDemoSettings(seed)
    check_folder(out_dir, OURS)
    with locked(out_dir, "demo", console):
        make_room(out_dir, settings.to_dict(), RECORD, (SHELF, IMAGES, RUNS))
        write_json(out_dir / RECORD, {"settings": settings.to_dict()})
        demo = _Demo(out_dir, settings, console, expert_store(out_dir) if cache is None else cache)
        demo.run()
        demo.report(out_dir / REPORT)
        write_json(out_dir / SUMMARY, {**demo.summary(), "seconds": time.perf_counter() - began})
        found = read(out_dir / SUMMARY)
    say_where(console, found["seconds"], out_dir)
    return found


class _Demo:
    """A demo at work, step by step. seconds: of each step that was done here."""

    def __init__(self, out_dir: Path, settings: ShelfDemoSettings, console: Console, cache: Path):
        self.out_dir, self.settings, self.console = out_dir, settings, console
        self.shelf, self.images = out_dir / SHELF, out_dir / IMAGES
        self.seconds: dict[str, float] = {}
        task = DigitsTask(settings.seed)
        self.snapshots = DigitsSnapshots(task, settings.snapshots, settings.networks, cache)
        self.newcomer = DigitsSnapshots(
            task, settings.snapshots, (settings.newcomer,), cache, (settings.rendering,)
        )
        self.found: dict[str, Any] = {}

    def run(self) -> None:
        """All steps; what is not there is done."""
        seed, shelf = self.settings.seed, self.shelf
        grown = shelf / GROWN
        self._step("snapshots", self._snapshots)
        self._step("images", self._images)
        self._step("extract", self._extract, shelf / RANK)
        # Folds of seed 0, as those of fit and compare: heads are then fitted once.
        self._step("rank", lambda: rank(shelf), shelf / RANK)
        self._step("fit", self._fit, shelf / HUB / RESULT)
        self._step("compare", lambda: compare(shelf, seed=seed), shelf / COMPARE)
        self._step("prune", lambda: prune(shelf, out=shelf / PRUNED), shelf / PRUNE)
        self._step("add", self._add, grown / ADD)
        self._step("predict", self._predict)
        self._step("unfreeze", lambda: unfreeze(shelf))

    @property
    def small(self) -> Path:
        """The smallest hub that there is: no expert may be droppable."""
        pruned = self.shelf / PRUNED
        return pruned if pruned.exists() else self.shelf / HUB

    def _step(self, name: str, work: Callable[[], Any], file: Path | None = None) -> None:
        """Does a step, unless its file, the last that it writes, says that it is done."""
        done = None if file is None else read(file)
        began = time.perf_counter()
        if done is None:
            self._say(f"{name} ...")
            done = work()
        self.found[name], self.seconds[name] = done, time.perf_counter() - began
        self._say(f"{name}: {self.seconds[name]:.1f} s")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _snapshots(self) -> None:
        runs = self.out_dir / RUNS
        runs.mkdir(exist_ok=True)
        for snapshots in (self.snapshots, self.newcomer):
            make_snapshots(snapshots, runs, self.console)

    def _images(self) -> None:
        splits = digits_splits(self.settings.seed, self.settings.num_validation)
        aside = self.images.with_name(f"{IMAGES}.part")
        if not self.images.exists():
            shutil.rmtree(aside, ignore_errors=True)
            write_shelf_images(aside, splits).rename(self.images)
        sizes = ", ".join(f"{len(data)} {split}" for split, data in splits.items())
        self._say(f"{sizes} images in five renderings, {self.images}")

    def _extract(self) -> None:
        """All models at the digits' size; mirrored digits are no digits."""
        settings = ExtractSettings(
            data=str(self.images), image_size=self.snapshots.task.size, flip=False
        )
        done = extract_shelf(self.shelf, self.snapshots.specs, settings, console=self.console)
        for line in summary(done):
            self._say(line)
        if done.failed:
            raise OSError(f"{done.failed[0][0]} has no features: {done.failed[0][1]}")

    def _fit(self) -> dict[str, Any]:
        trainer = replace(self.settings.fit.trainer, seed=self.settings.seed)
        settings = replace(self.settings.fit, trainer=trainer)
        _, found = shelf_fit(self.shelf, settings, resume=True, console=self.console)
        if not found:
            raise InterruptedError("stopped; the same command goes on from here")
        return found

    def _add(self) -> dict[str, Any]:
        """The newcomer joins the small hub; one that makes nothing better is refused, in words."""
        [training] = self.newcomer.trainings
        try:
            return add(self.shelf, training.specs[-1], self.small, self.shelf / GROWN)
        except NothingBetter as refused:
            return {"expert": training.files[-1].stem, "reason": str(refused)}

    def _predict(self) -> dict[str, Any]:
        """The small hub on the test images' files: from pixels what the shelf says by features."""
        hub, predictor = open_predictor(self.shelf, self.small)
        numbers = hub.shelf.splits["test"]
        rows = hub.shelf.images().rows["test"]
        files = [str(self.images / row.path) for row in rows]
        said = [prediction.label for prediction in predict_each(hub, predictor, files)]
        with torch.no_grad():
            known = hub.model(numbers.double()).argmax(dim=1)
        names = hub.shelf.classes
        same = sum(label == names[i] for label, i in zip(said, known.tolist(), strict=True))
        right = sum(label == row.label for label, row in zip(said, rows, strict=True))
        self._say(sentence(predictor))
        return {
            "images": len(files), "same": same, "accuracy": right / len(files),
            "forwards": predictor.forwards.experts / len(files),
            "bodies": predictor.forwards.opened,
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds, but for the seconds of the whole."""
        found, chosen = self.found, self.found["prune"]["chosen"]
        compared = found["compare"]
        scored = {row["name"]: row for row in compared["rows"] if not row["reason"]}
        split = compared["split"]
        return {
            "seed": self.settings.seed,
            "models": len(self.snapshots.specs),
            "k": compared["k"],
            "images": compared["images"],
            "accuracy": {name: row[split]["accuracy"] for name, row in scored.items()},
            "forwards": {name: row["forwards"] for name, row in scored.items()},
            "tau": {name: score["tau"] for name, score in found["rank"]["agreement"].items()},
            "recall": {name: score["recall"] for name, score in found["rank"]["agreement"].items()},
            "dropped": 0 if chosen is None else len(chosen["dropped"]),
            "pruned": None if chosen is None else chosen["test"],
            "predict": found["predict"],
            "steps": self.seconds,
        }

    def report(self, path: Path) -> None:
        """Draws figures, whose library takes a second to import."""
        from .shelf_report import ShelfDemo, write_shelf_report

        hub = open_hub(self.shelf / HUB)
        with torch.no_grad():
            weights = weights_of(hub.model.route(hub.shelf.splits["test"].double()))
        drawn = [Path(row.path).stem.rpartition("_")[2] for row in hub.shelf.images().rows["test"]]
        found, names = self.found, list(RENDERINGS)
        page = ShelfDemo(
            seed=self.settings.seed,
            models=len(self.snapshots.specs),
            rank=found["rank"],
            compare=found["compare"],
            prune=found["prune"],
            added=found["add"],
            predicted=found["predict"],
            unfrozen=found["unfreeze"],
            weights=weights,
            experts=hub.labels,
            renderings=torch.tensor([names.index(name) for name in drawn]),
            rendering_names=names,
        )
        write_shelf_report(path, page)
