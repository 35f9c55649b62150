"""What the terminal shows of a comparison at work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from ..training import read_log
from .plan import PRETRAIN, Job
from .results import RESULT, SeedResults, read


class JobProgress:
    """A line for every job that ends; on a terminal, below them, one that tells of those at work.

    What a job came to, how far one is, and what else there is to tell, subclasses say. A job's
    ``name`` stands in the line of those at work, itself as text where it ends.
    """

    def __init__(self, console: Console, total: int):
        self.console, self.total, self.done = console, total, 0
        shown = console.is_terminal and not console.quiet
        self._live = Live(console=console, auto_refresh=False, transient=True) if shown else None

    def said(self, job: Any) -> str:
        """What it came to, with markup."""
        raise NotImplementedError

    def share(self, job: Any) -> float:
        """Of a job's steps, those that it took."""
        raise NotImplementedError

    def more(self) -> str:
        """The end of the line of those at work."""
        return ""

    def __enter__(self):
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def ended(self, job: Any, seconds: float) -> None:
        self.done += 1
        self.console.print(
            f"\\[{self.done}/{self.total}] {escape(str(job))}: {self.said(job)}, {seconds:.0f} s",
            soft_wrap=True,
            highlight=False,
        )

    def refresh(self, running: Sequence[Any]) -> None:
        if self._live is None or not running:
            return
        shares = ", ".join(f"{job.name} {self.share(job):.0%}" for job in running)
        text = f"[{self.done}/{self.total}] {len(running)} running: {shares}{self.more()}"
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)


class Progress(JobProgress):
    """Of runs that are judged by the task's metric. steps: of (a run of length 1, a
    pre-training)."""

    def __init__(
        self,
        console: Console,
        results: dict[int, SeedResults],
        total: int,
        out_dir: Path,
        steps: tuple[int, int],
    ):
        super().__init__(console, total)
        self.results, self.out_dir, self.steps, self.best = results, out_dir, steps, None

    def said(self, job: Job) -> str:
        metric = self.results[job.seed].task.metric
        result = read(job.folder(self.out_dir) / RESULT)
        if result is None:
            return f"[red]failed:[/] {escape(read(job.failed(self.out_dir))['error'])}"
        if "validation" not in result:
            return "pre-trained"
        value = result["validation"][metric.name]
        if self.best is None or metric.is_better(value, than=self.best[0]):
            self.best = value, f"{metric.text(value)} ({job.name})"
        return f"validation {metric.name} {metric.text(value)}"

    def share(self, job: Job) -> float:
        """As its log has it."""
        log = read_log(job.folder(self.out_dir) / "log.jsonl")
        steps = self.steps[job.run.startswith(PRETRAIN)] * job.length
        return log[-1]["step"] / steps if log else 0.0

    def more(self) -> str:
        return "" if self.best is None else f" | best so far {self.best[1]} on validation"
