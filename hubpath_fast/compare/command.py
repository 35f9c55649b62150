"""``hubpath compare``: does what is missing, and writes the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..data.cache import free_memory
from ..data.named import DIGITS
from ..locks import locked
from ..notes import show_notes
from ..runs.places import check_apart
from .digits_hub import Pretraining, expert_store
from .methods import Method, choose_methods, methods_of
from .plan import PREPARE, Job, needed_runs, plan_jobs
from .problems import open_problem
from .progress import Progress
from .results import FAILED, RESULT, SeedResults, files_of, read, seed_folder
from .settings import PROBLEM, CompareSettings, as_begun, names_of_experts, open_folder
from .work import Body
from .workers import Workers, choose_workers, workers_that_fit


def compare(
    settings: CompareSettings,
    methods: str,
    seeds: Sequence[int],
    out_dir: str | Path,
    workers: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Trains what is missing of a comparison, and writes ``table.json``, ``.md`` and ``.html``.

    Args:
        settings: data, hub and budget.
        methods: names, comma-separated, or "all"; see ``choose_methods``.
        seeds: everything is done once for each.
        out_dir: a new folder, or one of the same comparison.
        workers: concurrent runs, each with its share of the cores; None: as many as there are
            cores, at most 4, and as memory has room for (on a GPU one).
        console: where progress and the table are shown; None: standard output.

    Returns:
        The rows of ``table.json``; see ``make_rows``.

    Raises:
        ValueError: unknown methods, data or hub that cannot be used, a folder of another
            comparison or one in use.
        InterruptedError: a signal came.
    """
    console, out_dir = console or Console(), Path(out_dir)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different integers, got {list(seeds)}")
    chosen = choose_methods(methods, methods_of(settings))
    count, threads = choose_workers(workers, settings.fit.trainer.device)
    settings, note = as_begun(settings, out_dir)
    show_notes([note] if note else [], console)
    check_apart(out_dir, settings.fit.dataset, settings.fit.data)
    open_folder(out_dir, settings, take=False)  # before there is a lock in it
    with locked(out_dir, "comparison", console):
        open_folder(out_dir, settings)
        train_missing(settings, chosen, seeds, out_dir, count, threads, console)
        # Draws figures: what takes a second to import can wait until here.
        from .tables import all_notes, describe_budget, make_rows, terminal_table, write_tables

        rows = make_rows(settings, chosen, seeds, out_dir)
        table = write_tables(out_dir, settings, rows, seeds)
    console.print(terminal_table(table, describe_budget(settings)))
    for note in all_notes(settings, rows, seeds, out_dir):
        console.print(escape(note), soft_wrap=True, highlight=False)
    console.print(
        f"The table is in {out_dir / 'table.html'} (.md, .json); `hubpath report {out_dir}` shows "
        "which experts each image was sent to.",
        soft_wrap=True,
        markup=False,  # of a path with brackets
    )
    return rows


def train_missing(
    settings: CompareSettings,
    methods: Sequence[Method],
    seeds: Sequence[int],
    out_dir: Path,
    count: int,
    threads: int,
    console: Console,
    cache: Path | None = None,
) -> None:
    """Does the runs of a comparison that are not finished, in up to ``count`` processes.

    Args: see ``compare``; threads: of each process. cache: where the digits' pre-trained experts
    are kept; None: see ``expert_store``.

    Raises:
        ValueError: data or hub that cannot be used, before anything is trained.
        InterruptedError: a signal came.
    """
    body = Body(settings, out_dir, expert_store(out_dir) if cache is None else cache, threads)
    results = {seed: SeedResults(out_dir, seed, settings.rates) for seed in seeds}
    missing = [Job(seed, PREPARE) for seed in seeds if results[seed].problem is None]
    begun = files_of(out_dir).is_file() or len(missing) < len(seeds)
    if missing:
        numbers = ", ".join(str(job.seed) for job in missing)
        console.print(f"Reading data and hub of seed {numbers}.", highlight=False)
        Workers(body, out_dir, 1, threads).run(
            missing, lambda job: results[job.seed].problem is not None, _check_prepared(out_dir)
        )
    notes = [text for r in results.values() for text in r.problem.get("notes", ())]
    show_notes(dict.fromkeys(notes), console)

    jobs = [job for seed in seeds for job in _jobs(settings, methods, results[seed])]
    missing = [job for job in jobs if not _is_done(job, out_dir)]
    if missing and begun and settings.fit.dataset != DIGITS:
        # Data may have changed since; what is refused here, each run would refuse for itself.
        show_notes(check_data(settings, seeds[0], out_dir), console)
    parameters = max(r.problem.get("parameters", 0) for r in results.values())
    count = workers_that_fit(count, parameters, free_memory())
    text = f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished"
    if missing:
        text += f"; {len(missing)} to do, {count} at a time with {threads} thread(s) each"
    console.print(text + ".", soft_wrap=True, highlight=False)
    if missing:
        steps = settings.fit.trainer.steps, _pretraining(settings).steps
        with Progress(console, results, len(missing), out_dir, steps) as progress:
            Workers(body, out_dir, count, threads).run(
                missing, lambda job: _is_done(job, out_dir), progress.ended, progress.refresh
            )


def check_data(settings: CompareSettings, seed: int, out_dir: Path) -> tuple[str, ...]:
    """What is new in the data since the comparison began, by the list of its images. One of an
    earlier version has none, and gets one of what is there.

    Raises ValueError if images that it began with are gone or others now.
    """
    files = files_of(out_dir)
    problem = open_problem(settings, seed, files=files)
    noted = seed_folder(out_dir, seed) / PROBLEM
    problem.check_same(read(noted), noted)
    if not files.is_file() and (listed := problem.files()) is not None:
        listed.write(files)
    return problem.changes


def _check_prepared(out_dir: Path):
    def ended(job: Job, _seconds: float) -> None:
        if read(seed_folder(out_dir, job.seed) / PROBLEM) is None:
            raise ValueError(read(job.folder(out_dir) / FAILED)["error"])

    return ended


def _jobs(settings: CompareSettings, methods: Sequence[Method], results: SeedResults) -> list[Job]:
    """Of one seed, the pre-training of experts whose weights are not there among them."""
    noted, names = results.problem, names_of_experts(settings)
    able = [m for m in methods if not (m.barred or (m.equal and noted["difference"]))]
    needed = needed_runs(able, methods_of(settings))
    trainer = settings.fit.trainer
    pretraining = _pretraining(settings)
    share = pretraining.steps * pretraining.batch_size / (trainer.steps * trainer.batch_size)
    return plan_jobs(
        needed,
        results.seed,
        settings.rates,
        noted.get("costs") or [1.0] * len(names),
        {int(i): tuple(before) for i, before in noted.get("pretrain", {}).items()},
        share,
    )


def _pretraining(settings: CompareSettings) -> Pretraining:
    return Pretraining(epochs=settings.digits_pretrain_epochs)


def _is_done(job: Job, out_dir: Path) -> bool:
    return read(job.folder(out_dir) / RESULT) is not None
