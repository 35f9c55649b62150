"""What the terminal shows of a comparison at work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from ..training import read_log
from .plan import PRETRAIN, Job
from .results import FAILED, RESULT, SeedResults, read


class Progress:
    """A line for every run that ends; on a terminal, below them, one that tells of those at work.

    steps: of (a run of length 1, a pre-training).
    """

    def __init__(
        self,
        console: Console,
        results: dict[int, SeedResults],
        total: int,
        out_dir: Path,
        steps: tuple[int, int],
    ):
        self.console, self.results, self.total = console, results, total
        self.out_dir, self.steps = out_dir, steps
        self.done, self.best = 0, None
        shown = console.is_terminal and not console.quiet
        self._live = Live(console=console, auto_refresh=False, transient=True) if shown else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def ended(self, job: Job, seconds: float) -> None:
        self.done += 1
        folder, metric = job.folder(self.out_dir), self.results[job.seed].task.metric
        result = read(folder / RESULT)
        if result is None:
            said = f"[red]failed:[/] {escape(read(folder / FAILED)['error'])}"
        elif "validation" not in result:
            said = "pre-trained"
        else:
            value = result["validation"][metric.name]
            said = f"validation {metric.name} {metric.text(value)}"
            if self.best is None or metric.is_better(value, than=self.best[0]):
                self.best = value, f"{metric.text(value)} ({job.name})"
        self.console.print(
            f"\\[{self.done}/{self.total}] {escape(str(job))}: {said}, {seconds:.0f} s",
            soft_wrap=True,
            highlight=False,
        )

    def refresh(self, running: Sequence[Job]) -> None:
        if self._live is None or not running:
            return
        shares = ", ".join(f"{job.name} {self._share(job):.0%}" for job in running)
        parts = [f"[{self.done}/{self.total}] {len(running)} running: {shares}"]
        if self.best is not None:
            parts += [f" | best so far {self.best[1]} on validation"]
        self._live.update(Text("".join(parts), no_wrap=True, overflow="ellipsis"), refresh=True)

    def _share(self, job: Job) -> float:
        """Of a job's steps, as its log has it."""
        log = read_log(job.folder(self.out_dir) / "log.jsonl")
        steps = self.steps[job.run.startswith(PRETRAIN)] * job.length
        return log[-1]["step"] / steps if log else 0.0
