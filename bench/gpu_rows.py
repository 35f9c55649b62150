"""Results of ``bench.gpu_check`` and ``bench.gpu_speed``: their lines, by device."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable
from pathlib import Path

from . import jsonl
from .children import is_result
from .gpu_goals import Rows
from .records import slug

FILE = "gpu.jsonl"


def rows_of(run: Path) -> list[dict]:
    """The lines of a run, each with its device: that of its group, or else of the run."""
    files = sorted(run.glob("*.jsonl")) if run.is_dir() else [run]
    rows = [row for file in files for row in jsonl.read(file)]
    by_group = {(r["part"], r["group"]): r["device"] for r in rows if "device" in r}
    usual = next((row["device"] for row in rows if "device" in row), None)
    if usual is None:
        raise ValueError(f"{run}: no line names a device; is it a folder of bench.gpu_check?")
    return [{"device": by_group.get((row["part"], row["group"]), usual), **row} for row in rows]


def newest(rows: Iterable[dict]) -> Rows:
    """Of rows with one key the newest; of equally old ones the last. A failure that did not come
    again when its group was run once more, and ended well, is left out: what was measured since has
    other names, as the sizes of a kernel that raised at first."""
    found: Rows = {}
    for row in rows:
        key = row["part"], row["group"], row["name"]
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    begun = {key[:2]: _begun(row) for key, row in found.items() if key[2] == "group" and row["ok"]}

    def is_over(key: tuple[str, str, str], row: dict) -> bool:
        return not row["ok"] and key[:2] in begun and _date(row) < begun[key[:2]]

    return {key: row for key, row in found.items() if not is_over(key, row)}


def _date(row: dict) -> datetime.datetime:
    return datetime.datetime.fromisoformat(row["date"])


def _begun(group: dict) -> datetime.datetime:
    """When a group began, by the line on how it ended."""
    return _date(group) - datetime.timedelta(seconds=group["seconds"])


def merge(runs: Iterable[Path], results: Path) -> list[Path]:
    """Adds runs to the devices' files; those that were written."""
    devices: dict[str, list[dict]] = {}
    for run in runs:
        for row in rows_of(run):
            devices.setdefault(row["device"], []).append(row)
    written = []
    for device, rows in devices.items():
        path = results / slug(device) / FILE
        merged = newest([*jsonl.read(path), *rows])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(merged[key]) + "\n" for key in sorted(merged)))
        written.append(path)
    return written


def part(rows: Rows, name: str, group: str | None = None) -> list[dict]:
    """Results of a part (and a group), without the lines on how groups ended."""
    return [
        row
        for key, row in rows.items()
        if key[0] == name and group in (None, key[1]) and is_result(row)
    ]


def timed(found: Iterable[dict]) -> list[dict]:
    return [row for row in found if row["ok"] and "p50" in row]


def devices_in(results: Path) -> list[Rows]:
    """The rows of each device: GPUs before CPUs, those that were measured last before others."""
    found = [newest(jsonl.read(path)) for path in sorted(results.glob(f"*/{FILE}"))]
    found.sort(key=lambda rows: last_of(rows)["date"], reverse=True)
    return sorted(found, key=lambda rows: not on_gpu(rows))


def on_gpu(rows: Rows) -> bool:
    return any("driver" in row for row in rows.values())


def last_of(rows: Rows) -> dict:
    """The newest row that says what it ran on."""
    return max((row for row in rows.values() if "commit" in row), key=lambda row: row["date"])


def card(rows: Rows) -> str:
    """The device, without its maker and its memory."""
    return re.sub(r" \d+ ?GB.*", "", last_of(rows)["device"].removeprefix("NVIDIA "))
