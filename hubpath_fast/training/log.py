"""The run's records: ``log.jsonl``, TensorBoard events, and the line that the terminal shows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ..files import write_text
from ..measure import Measure
from .progress import ProgressLine
from .run_state import RunState

SAMPLES = ("evaluation",)  # lists of scores, one a game


@dataclass(frozen=True)
class Reporting:
    """How a run reports.

    console: where progress is shown; None: standard output. label: the first word of its line.
    expert_names: for logs and messages. tensorboard: whether events are written to
    ``out_dir/tensorboard``. progress: False shows nothing. resume_hint: how to resume, in words.
    metric: how the progress line shows values of its name; None: as they are in the log.
    """

    console: Console | None = None
    label: str = ""
    expert_names: Sequence[str] | None = None
    tensorboard: bool = True
    progress: bool = True
    resume_hint: str = "resume=True"
    metric: Measure | None = None

    def names_of(self, model: nn.Module) -> Sequence[str] | None:
        """The experts' names; ValueError unless there is one for each expert of the model."""
        experts = getattr(model, "experts", None)
        if self.expert_names and experts is not None and len(self.expert_names) != len(experts):
            raise ValueError(
                f"expert_names: expected {len(experts)}, one for each expert, got "
                f"{len(self.expert_names)}"
            )
        return self.expert_names


class JsonLog:
    """One JSON object a line, each with its ``step``. Opening it drops every line after
    ``last_step`` (and one cut short by a crash), so that a resumed run repeats none."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = Path(path)
        self.records = [r for r in read_log(self.path) if r["step"] <= last_step]
        write_text(self.path, "".join(map(_line, self.records)))
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
        for line in Path(path).read_bytes().splitlines():
            try:
                record = json.loads(line)
                whole = isinstance(record["step"], int)
            except (ValueError, TypeError, KeyError):
                whole = False
            if not whole:  # cut short by a crash: nothing after it can be trusted
                break
            records.append(record)
    return records


class TensorBoardLog:
    """The same records as scalars; a nested or per-expert value becomes ``key/name``, such as
    ``routes/share/EXPERT``. Of ``SAMPLES`` it is the mean; a list of words or of events is left
    out."""

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
        elif isinstance(value, (list, tuple)):
            self._add_list(tag, value, step)
        elif isinstance(value, (int, float)):
            self._writer.add_scalar(tag, value, step)

    def _add_list(self, tag: str, values: Sequence[Any], step: int) -> None:
        if any(isinstance(item, (str, Mapping)) for item in values):
            return
        if tag in SAMPLES:
            self._add(tag, math.fsum(values) / len(values), step)
            return
        for i, item in enumerate(values):
            self._add(f"{tag}/{self.names[i] if self.names else i}", item, step)

    def close(self) -> None:
        self._writer.close()


class NoLog:
    """Of a rank that another one speaks for."""

    records: Sequence[dict[str, Any]] = ()

    def advance(self, step: int) -> None: ...

    def message(self, text: str) -> None: ...

    def write(self, record: Mapping[str, Any], losses: Sequence[str]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """All that a run's records go to: ``log.jsonl``, TensorBoard and the progress line.

    state: where the run stands; lines of later steps are dropped.
    """

    def __init__(self, out_dir: Path, reporting: Reporting, steps: int, state: RunState) -> None:
        out_dir.mkdir(parents=True, exist_ok=True)
        self._json = JsonLog(out_dir / "log.jsonl", state.reported)
        self._writers = [self._json]
        if reporting.tensorboard:
            names = reporting.expert_names
            self._writers.append(TensorBoardLog(out_dir / "tensorboard", state.reported, names))
        console = reporting.console if reporting.progress else Console(quiet=True)
        self._progress = ProgressLine(steps, state.step, console, reporting.label, reporting.metric)
        self.advance, self.message = self._progress.advance, self._progress.message
        self.sync, self.records = self._json.sync, self._json.records

    def write(self, record: Mapping[str, Any], losses: Sequence[str]) -> None:
        """A line of the log; the progress line shows the named losses of it."""
        for writer in self._writers:
            writer.write(record)
        self._progress.report(record, losses)

    def close(self) -> None:
        for part in (self._progress, *self._writers):
            part.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
