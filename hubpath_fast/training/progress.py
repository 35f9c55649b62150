"""What the terminal shows of a run: one line."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..measure import Measure


class ProgressLine:
    """One line that renews itself on a terminal; elsewhere a plain line for each further twentieth
    of the steps, and one at the end.

    steps: of the run. start: the step that it begins or goes on at. label: the line's first word.
    metric: how values of its name, balanced or not, are shown.
    """

    REFRESH_SECONDS = 0.2
    PLAIN_LINES = 20

    def __init__(
        self,
        steps: int,
        start: int,
        console: Console | None = None,
        label: str = "",
        metric: Measure | None = None,
    ) -> None:
        self.steps, self.start, self.label, self.metric = steps, start, label, metric
        self.console = Console() if console is None else console
        self._text, self._best, self._routes = "", "", ""
        self._shown, self._began = 0.0, time.monotonic()
        self._plain = self._part(start)
        self._bar = self._task = None
        if self.console.is_terminal and not self.console.quiet:
            whole = Column(no_wrap=True)
            # The one column that gives way on a narrow terminal: the least important last.
            rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            columns = (
                TextColumn("{task.description}", table_column=whole),
                TextColumn("step {task.completed}/{task.total}", table_column=whole),
                BarColumn(bar_width=10),
                TextColumn("{task.percentage:>3.0f}% ETA", table_column=whole),
                TimeRemainingColumn(compact=True, table_column=whole),
                TextColumn("{task.fields[text]}", table_column=rest),
            )
            # No refresh thread: it would contend with the step for the interpreter.
            self._bar = Progress(*columns, console=self.console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task(label, total=steps, completed=start, text="")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Move to ``step``; cheap enough for every step."""
        now = time.monotonic()
        if self._bar is not None and now - self._shown > self.REFRESH_SECONDS:
            self._shown = now
            self._bar.update(self._task, completed=step, text=self._text, refresh=True)

    def report(self, record: Mapping[str, Any], losses: Sequence[str] = ("loss",)) -> None:
        """Show a record of the log, of its values the named losses."""
        step = record["step"]
        if "validation" in record:
            scores = record["validation"]
            names = [k for k in scores if k not in ("n", "loss")] or ["loss"]
            self._best = " ".join(f"val {k} {self._value(k, scores[k])}" for k in names)
        rate = record.get("time", {}).get("images_per_second")
        shown = [f"{k} {record[k]:.3g}" for k in losses if record.get(k) is not None]
        parts = [] if rate is None else [f"{rate:.0f} images/s"]
        parts += [self._best] * bool(self._best)
        parts += [" ".join(shown)] * bool(shown)
        if "entropy_fraction" in record:
            parts.append(f"entropy {record['entropy_fraction']:.2f}")
        if "routes" in record:
            self._routes = f"routes {record['routes']['sets']}"
        parts += [self._routes] * bool(self._routes)
        if parts:
            self._text = " | ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text, refresh=True)
            return
        if self._part(step) == self._plain:
            return
        self._plain, done = self._part(step), step - self.start
        left = (time.monotonic() - self._began) / done * (self.steps - step) if done else math.nan
        eta = "" if math.isnan(left) else f" ETA {int(left) // 60}:{int(left) % 60:02d}"
        head = f"{self.label} " if self.label else ""
        self.message(f"{head}step {step}/{self.steps} {step / self.steps:.0%}{eta} | {self._text}")

    def _value(self, name: str, value: float) -> str:
        known = self.metric is not None and name.removeprefix("balanced_") == self.metric.name
        return self.metric.text(value) if known else f"{value:.3f}"

    def _part(self, step: int) -> int:
        return self.PLAIN_LINES * step // self.steps

    def message(self, text: str) -> None:
        """Say something above the progress line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
