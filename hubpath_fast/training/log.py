"""The run's records: ``log.jsonl``, TensorBoard events, and what the terminal shows."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


@dataclass(frozen=True)
class Reporting:
    """How a run reports.

    console: where progress is shown; None: standard output. label: the first word of its line.
    expert_names: for logs and messages. tensorboard: whether events are written to
    ``out_dir/tensorboard``. progress: False shows nothing. resume_hint: how to resume, in words.
    """

    console: Console | None = None
    label: str = ""
    expert_names: Sequence[str] | None = None
    tensorboard: bool = True
    progress: bool = True
    resume_hint: str = "resume=True"


class JsonLog:
    """One JSON object a line, each with its ``step``. Opening it drops every line after
    ``last_step`` (and one cut short by a crash), so that a resumed run repeats none."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = Path(path)
        self.records = [r for r in read_log(self.path) if r["step"] <= last_step]
        aside = self.path.with_name(f".{self.path.name}.new")
        aside.write_text("".join(map(_line, self.records)), encoding="utf-8")
        os.replace(aside, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; what is not finite becomes null, which JSON can hold."""
        line = _line(_finite(record))
        self.records.append(json.loads(line))
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:  # Python does not say which file
            raise OSError(error.errno, f"cannot log: {error.strerror}", str(self.path)) from error

    def sync(self) -> None:
        """Have the lines on the disk before a checkpoint says that they are."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole records of a ``log.jsonl``; an empty list where there is none."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # cut short by a crash: nothing after it can be trusted
                break
    return records


class TensorBoardLog:
    """The same records as scalars; a nested or per-expert value becomes ``key/name``."""

    def __init__(self, folder: Path, last_step: int, names: Sequence[str] | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where wanted

        self.names = names
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if key != "step":
                self._add(key, value, record["step"])

    def _add(self, tag: str, value: Any, step: int) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._add(f"{tag}/{key}", item, step)
        elif isinstance(value, (list, tuple)) and tag != "warnings":
            for i, item in enumerate(value):
                self._add(f"{tag}/{self.names[i] if self.names else i}", item, step)
        elif isinstance(value, (int, float)):
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class ProgressLine:
    """One line that renews itself on a terminal, one plain line per log interval elsewhere."""

    REFRESH_SECONDS = 0.2

    def __init__(self, steps: int, start: int, console: Console | None, label: str = "") -> None:
        self.steps, self.start, self.label = steps, start, label
        self.console = Console(stderr=False) if console is None else console
        self._text, self._best, self._shown, self._began = "", "", 0.0, time.monotonic()
        self._bar = self._task = None
        if self.console.is_terminal and not self.console.quiet:
            whole = {"no_wrap": True}
            columns = (
                TextColumn("{task.description}", table_column=Column(**whole)),
                TextColumn("step {task.completed}/{task.total}", table_column=Column(**whole)),
                BarColumn(bar_width=10),
                TextColumn("{task.percentage:>3.0f}% ETA", table_column=Column(**whole)),
                TimeRemainingColumn(compact=True, table_column=Column(**whole)),
                # The one column that gives way on a narrow terminal: the least important last.
                TextColumn(
                    "{task.fields[text]}",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
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
            self._best = " ".join(f"val {k} {scores[k]:.3f}" for k in names)
        rate = record.get("time", {}).get("images_per_second")
        shown = [f"{k} {record[k]:.3g}" for k in losses if record.get(k) is not None]
        parts = [f"{rate:.0f} images/s"] * (rate is not None) + [self._best] * bool(self._best)
        parts += [" ".join(shown)] * bool(shown)
        if "entropy_fraction" in record:
            parts.append(f"entropy {record['entropy_fraction']:.2f}")
        if parts:
            self._text = " | ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text, refresh=True)
            return
        done = step - self.start
        left = (time.monotonic() - self._began) / done * (self.steps - step) if done else math.nan
        eta = "" if math.isnan(left) else f" ETA {int(left) // 60}:{int(left) % 60:02d}"
        head = f"{self.label} " if self.label else ""
        self._print(f"{head}step {step}/{self.steps} {step / self.steps:.0%}{eta} | {self._text}")

    def message(self, text: str) -> None:
        """Say something above the progress line."""
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
