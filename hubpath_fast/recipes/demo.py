"""``hubpath demo`` and ``hubpath landmarks demo``: the whole loop on real images, with no download
and no GPU.

Five tiny networks are pre-trained, each on one rendering of handwritten digits; then the target
task, a few hundred digits in all renderings mixed, is learned in every way that Hub-Pathway has to
beat, with the same number of steps and the same batches. It is a comparison (see ``compare``) with
a page of its own. What is learned of the digits, their classes or their landmarks, is the one thing
that differs between the two: see ``DemoKind`` and ``landmarks_demo``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..compare.command import train_missing
from ..compare.digits_hub import NETWORKS
from ..compare.methods import choose_methods, methods_of
from ..compare.plan import PRETRAIN
from ..compare.results import RESULT, SeedResults, read, run_folder
from ..compare.settings import (
    COMPARE_FILE,
    CompareSettings,
    make_settings,
    names_of_experts,
    open_folder,
)
from ..compare.workers import choose_workers, start_server
from ..data import DigitsTask
from ..files import write_json
from ..locks import LOCK, locked

if TYPE_CHECKING:
    from .demo_report import Words

SUMMARY, REPORT = "summary.json", "report.html"
OURS = {SUMMARY, REPORT, COMPARE_FILE, "runs", "experts", LOCK}

METHODS = (
    "single,best-single,best-single-in-hindsight,ensemble-top-k,ensemble,ensemble-hard,"
    "hub-pathway,oracle"
)
# Of the bodies, for every method; chosen for Hub-Pathway on validation digits of seeds 0, 1 and 2.
RATE = 5e-4


@dataclass(frozen=True)
class DemoKind:
    """What a demo is of.

    command: as users type it. methods: names, see ``choose_methods``. settings: (quick, device) ->
    the comparison. digits: (seed, digits held out) -> the data, with target, validation and test.
    words: the words of its page.
    """

    command: str
    methods: str
    settings: Callable[[bool, str], CompareSettings]
    digits: Callable[[int, int], Any]
    words: Callable[[], Words]


def demo_settings(quick: bool = False, device: str = "cpu") -> CompareSettings:
    """The demo as a comparison. quick: a few steps, whose figures say little."""
    hub = ",".join(NETWORKS)
    return make_settings("digits", hub, rates=(RATE,), quick=quick, trainer={"device": device})


def _words() -> Words:
    from .demo_report import CLASSES  # draws figures: takes a second to import

    return CLASSES


CLASSES_DEMO = DemoKind("hubpath demo", METHODS, demo_settings, DigitsTask, _words)


def demo(out_dir: str | Path = "hubpath-demo", *args: Any, **more: Any) -> dict[str, Any]:
    """The demo of classes; see ``run_demo``, whose arguments after ``kind`` it takes."""
    return run_demo(CLASSES_DEMO, out_dir, *args, **more)


def run_demo(
    kind: DemoKind,
    out_dir: str | Path,
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    console: Console | None = None,
    settings: CompareSettings | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Runs a demo and writes ``summary.json`` and ``report.html`` into ``out_dir``.

    Args:
        kind: of what.
        out_dir: a new or empty folder, or one of an earlier demo: a finished one is replaced, one
            that was stopped goes on.
        seed: of the split, the weights, the noise and the order of batches.
        quick: a few epochs only, to see it work; the figures say little then.
        device: anything torch.device takes.
        console: where progress and the table are shown; None: standard output.
        settings: None: those of the demo, or of ``quick``.
        cache: where pre-trained experts are kept; None: the user's cache folder.

    Returns:
        The contents of ``summary.json``: the task's metric on the test split, such as accuracies
        in 0..1.

    Raises:
        ValueError: out_dir holds something else.
        InterruptedError: a signal came; the same command goes on.
    """
    began = time.perf_counter()
    console, out_dir = console or Console(), Path(out_dir)
    settings = settings or kind.settings(quick, device)
    methods = choose_methods(kind.methods, methods_of(settings))
    count, threads = choose_workers(None, settings.fit.trainer.device)
    check_folder(out_dir)
    start_server(threads)  # imports what runs need, while the digits are read here
    task = kind.digits(seed, settings.digits_validation)
    console.print(
        f"[bold]{kind.command}[/]: {len(task.target)} digits in five renderings to learn from, "
        f"{len(task.validation)} to choose on, {len(task.test)} to test on; seed {seed}"
    )
    with locked(out_dir, "demo", console):
        make_room(out_dir, settings.to_dict())
        open_folder(out_dir, settings)
        train_missing(settings, methods, [seed], out_dir, count, threads, console, cache)
        # They draw figures: what takes a second to import can wait until here.
        from ..compare.tables import as_table, describe_budget, make_rows, terminal_table
        from .demo_report import Demo, write_report

        results = SeedResults(out_dir, seed, settings.rates)
        rows = make_rows(settings, methods, [seed], out_dir)
        failed = [row["reason"] for row in rows if row["reason"]]
        if failed:
            raise OSError(failed[0])
        summary = _summary(settings, results, rows, len(task.test), time.perf_counter() - began)
        finished = Demo(settings, results, methods, rows, task.test, summary, kind.words())
        write_report(out_dir / REPORT, finished)
        write_json(out_dir / SUMMARY, summary)
    table = as_table(rows, results.task.metric)
    console.print(terminal_table(table, describe_budget(settings)))
    say_where(console, summary["seconds"], out_dir)
    return summary


def say_where(console: Console, seconds: float, out_dir: Path) -> None:
    """The last line of a demo: how long it took, and where its files are."""
    console.print(
        f"{seconds:.0f} s. The numbers are in {out_dir / SUMMARY}, the figures in "
        f"{out_dir / REPORT}.",
        soft_wrap=True,
        markup=False,  # of a path with brackets
    )


def _summary(
    settings: CompareSettings,
    results: SeedResults,
    rows: list[dict[str, Any]],
    test_images: int,
    seconds: float,
) -> dict[str, Any]:
    """What ``summary.json`` holds; means of the metric, all on the same test split."""
    means = {row["method"]: row["mean"] for row in rows}
    trainer, names = settings.trainer(results.seed, settings.rates[0]), names_of_experts(settings)
    pretrained = [
        read(run_folder(results.out_dir, results.seed, f"{PRETRAIN}{i}", None) / RESULT)
        for i in range(len(names))
    ]
    singles = {name: means.pop(f"single:{name}") for name in names}
    return {
        **{method.replace("-", "_"): mean for method, mean in means.items()},
        "singles": singles,
        "rates": {
            "body": trainer.lr_expert, "head": trainer.lr_head, "router": trainer.lr_router,
        },
        "networks": dict(zip(names, settings.fit.hub, strict=True)),
        "seconds": seconds,
        "pretrain_seconds": sum(found["train_seconds"] for found in pretrained if found),
        "seed": results.seed,
        "k": settings.fit.k,
        "test_images": test_images,
    }  # fmt: skip


def check_folder(out_dir: Path, ours: Collection[str] = OURS) -> None:
    """Makes the folder where there is none; refuses one that holds anything but a demo, whose files
    and folders are ``ours``."""
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out: {out_dir} is a file; give a folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    strange = sorted(path.name for path in out_dir.iterdir() if path.name not in ours)
    if strange:
        raise ValueError(
            f"out: {out_dir} holds something that is no demo ({', '.join(strange[:5])}); choose "
            "another folder"
        )


def make_room(
    out_dir: Path,
    settings: dict[str, Any],
    record: str = COMPARE_FILE,
    folders: Collection[str] = ("runs", "experts"),
) -> None:
    """Empties the folder, unless it holds the demo of these settings, stopped before its end.
    record: the file that says of which it is. folders: that a demo makes."""
    held = read(out_dir / record)
    stopped = held is not None and not (out_dir / SUMMARY).exists()
    if stopped and held["settings"] == settings:
        return
    for name in folders:
        shutil.rmtree(out_dir / name, ignore_errors=True)
    for name in (SUMMARY, REPORT, record):
        (out_dir / name).unlink(missing_ok=True)
