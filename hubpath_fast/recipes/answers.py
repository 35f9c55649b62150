"""What ``hubpath predict`` writes: a row an image, as CSV or as JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .predict import Prediction

ENDINGS = (".csv", ".jsonl")
DIGITS = 6  # that count; a float32 has about seven


def check_ending(path: Path) -> None:
    """Raises ValueError unless ``AnswerFile`` can write such a file."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"out: expected a file ending in {' or '.join(ENDINGS)}, got {path}")
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder; give a file in it")


class AnswerFile:
    """A file that gets its rows as the answers come, so that a stop loses none that were given.

    CSV has the columns path, label, probability, error, then "expert:NAME" for the weight of each
    expert (0: not asked) and, if asked for, "class:NAME" for the probability of each class. JSON
    lines have path, label, probability, error, "experts": {NAME: weight} and "classes": {NAME:
    probability}. Of an image that could not be read error says why, and the rest is empty.

    UTF-8; of a path that is none, bytes are written as backslashed codes (\\udcff), which Python
    reads from JSON as the same path. Whole batches are written at once.

    path: replaced if it is there; its folder is made. experts: names. classes: none for no columns.
    """

    def __init__(self, path: Path, experts: Sequence[str], classes: Sequence[str] = ()):
        check_ending(path)
        self.path, self.experts, self.classes = path, experts, classes
        self.csv = path.suffix.lower() == ".csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "wb")  # noqa: SIM115
        if self.csv:
            columns = ["path", "label", "probability", "error"]
            columns += [f"expert:{name}" for name in experts]
            self._write(_lines([[*columns, *(f"class:{name}" for name in classes)]]))

    def write(self, predictions: Iterable[Prediction]) -> None:
        """Appends their rows; they are in the file when this returns."""
        if self.csv:
            self._write(_lines([self._row(p) for p in predictions]))
            return
        records = map(self._record, predictions)
        self._write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _row(self, p: Prediction) -> list[Any]:
        if p.error is not None:
            return [p.given, "", "", p.error, *[""] * (len(self.experts) + len(self.classes))]
        weights = [_rounded(p.experts.get(name, 0.0)) for name in self.experts]
        return [p.given, p.label, _rounded(p.probability), "", *weights, *self._probabilities(p)]

    def _record(self, p: Prediction) -> dict[str, Any]:
        read = p.error is None
        record = {
            "path": p.given,
            "label": p.label,
            "probability": _rounded(p.probability) if read else None,
            "error": p.error,
            "experts": {n: _rounded(p.experts.get(n, 0.0)) for n in self.experts} if read else None,
        }
        if self.classes:
            pairs = zip(self.classes, self._probabilities(p), strict=read)
            record["classes"] = dict(pairs) if read else None
        return record

    def _probabilities(self, p: Prediction) -> list[float]:
        if not self.classes or p.probabilities is None:
            return []
        return [_rounded(value) for value in p.probabilities.tolist()]

    def _write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()


def _lines(rows: Iterable[Sequence[Any]]) -> str:
    return "".join(map(_line, rows))


def _line(row: Sequence[Any]) -> str:
    out = io.StringIO()
    # Only characters of the terminator are quoted, and names may hold both of these.
    csv.writer(out, lineterminator="\r\n").writerow(row)
    return out.getvalue().removesuffix("\r\n") + "\n"


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
