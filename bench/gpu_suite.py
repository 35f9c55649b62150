"""All GPU tests and all GPU benchmarks in under nine minutes, in one process tree.

    python -m bench.gpu_suite --out DIR [--dry-run]

Sections run one after another, each in a process of its own with a time limit, so that one that
hangs or crashes costs only itself; what a section measures is on disk as it is measured. A section
without its time left is skipped and named. DIR gets ``ops.jsonl``, ``glue.jsonl``, a
``step-PRESET.json`` each, ``tests.xml``, one log a section, ``environment.json`` and ``table.txt``,
which is also printed last. Exit status: 0 if all went well, 1 if a section failed, 2 if there is no
GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import jsonl, records

TOTAL_SECONDS = 530  # under nine minutes, with the table
# How names of bench.step's ratios end.
RATIOS = (
    "_to_k_single", "_to_k_captured_single", "to_dense", "dense_to_graphs", "to_reference",
    "reference_to_graphs", "_share",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    name: str
    limit: float  # seconds
    command: tuple[str, ...]


def sections(out: Path) -> list[Section]:
    """In order of worth: what comes first still runs when time runs out."""
    python = sys.executable
    ops = (python, "-m", "bench.ops", "--device", "cuda", "--out", str(out / "ops.jsonl"))
    glue = (python, "-m", "bench.glue", "--device", "cuda", "--out", str(out / "glue.jsonl"))
    step = (python, "-m", "bench.step", "--device", "cuda")
    return [
        Section("glue", 40, (*glue, "--seconds", "1")),
        Section("tests", 130, (
            python, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", "tests",
            f"--junitxml={out / 'tests.xml'}",
        )),
        Section("step", 200, (
            *step, "--preset", "homogeneous", "--seconds", "15",
            "--json", str(out / "step-homogeneous.json"),
        )),
        Section("atari", 40, (
            *step, "--preset", "atari", "--seconds", "4", "--json", str(out / "step-atari.json"),
        )),
        Section("roof", 60, (*ops, "--seconds", "0.5", "--sizes", "roof")),
        Section("ops", 40, (*ops, "--seconds", "0.1", "--limit", "30")),
        Section("compiled", 20, (*glue, "--seconds", "1", "--compile", "--sizes", "1")),
    ]  # fmt: skip


def run(section: Section, limit: float, log: Path) -> int:
    """The section's exit status, its output in ``log``; 124 where it ran out of time."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            section.command, cwd=records.ROOT, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: itself and its children
            process.wait()
            return 124


def run_all(
    out: Path, total: float = TOTAL_SECONDS, runner: Callable[[Section, float, Path], int] = run
) -> dict[str, dict]:
    """Run the sections within ``total`` seconds: name -> status and seconds."""
    start, found = time.monotonic(), {}
    for section in sections(out):
        left = total - (time.monotonic() - start)
        if left < 5:
            found[section.name] = {"status": None, "seconds": 0.0}
            continue
        begin = time.monotonic()
        print(f"{section.name}: at most {min(section.limit, left):.0f} s", flush=True)
        status = runner(section, min(section.limit, left), out / f"{section.name}.log")
        found[section.name] = {"status": status, "seconds": time.monotonic() - begin}
    return found


def table(out: Path, statuses: dict[str, dict], environment: dict) -> str:
    """The short table: where, how each section ended, and the rows the goals are about."""
    words = {0: "ok", 124: "out of time", None: "skipped: no time left"}
    lines = [" ".join(f"{key}={value}" for key, value in environment.items()), ""]
    for name, found in statuses.items():
        status = words.get(found["status"], f"failed with status {found['status']}: see {name}.log")
        lines.append(f"{name:10} {found['seconds']:6.1f} s  {status}")
    lines += ["", tests_line(out / "tests.xml"), ""]
    for name in ("glue", "ops"):
        path = out / f"{name}.jsonl"
        rows = jsonl.read(path) if path.exists() else []
        notes = [row for row in rows if "note" in row]
        timed = [row for row in rows if "note" not in row and row["direction"] == "both"]
        lines += [row_line(row) for row in timed]
        lines += [f"{row.get('operation', name)} {row['row']}: {row['note']}" for row in notes]
    for path in sorted(out.glob("step-*.json")):
        lines += ["", *step_lines(json.loads(path.read_text()))]
    return "\n".join(lines) + "\n"


def row_line(row: dict) -> str:
    size = f"({row['N']}, {row['M']}, {row['K']}, {row['C']})"
    speedup = f"{row['speedup']:7.2f}x" if row.get("speedup") else ""
    share = f"{row['share_of_copy']:6.1%} of copy" if "share_of_copy" in row else ""
    return (
        f"{row.get('operation', 'glue'):12} {size:24} {row.get('routing', ''):8} {row['row']:9} "
        f"{row['mode']:5} {row['p50'] * 1e6:11.1f} us {speedup} {share}"
    )


def step_lines(found: dict) -> list[str]:
    """The rows of a whole step, and the ratios that the goals are about."""
    lines = []
    for size in found["sizes"].values():
        for row in size["rows"]:
            where = f"step {found['preset']} {size['px']} px {row['mode']:7} {row['row']:24}"
            if "note" in row:
                lines.append(f"{where} {row['note']}")
            else:
                lines.append(f"{where} N={row['N']:<5} {row['p50'] * 1e3:9.2f} ms")
    ratios = (f"{key} {found[key]:.3f}" for key in found if key.endswith(RATIOS))
    return [*lines, f"step {found['preset']}: " + ", ".join(ratios)]


def tests_line(path: Path) -> str:
    if not path.exists():
        return "tests: no report"
    suite = ET.parse(path).getroot()
    suite = suite if suite.tag == "testsuite" else suite[0]
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return "tests: " + ", ".join(f"{value} {key}" for key, value in count.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if args.dry_run:
        for section in sections(out):
            print(f"{section.name:10} {section.limit:4.0f} s  {' '.join(section.command)}")
        return 0
    if not torch.cuda.is_available():
        print("bench.gpu_suite: no GPU (torch.cuda.is_available() is False); nothing was run")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob("*.jsonl"), *out.glob("step-*.json"), out / "tests.xml"]:
        stale.unlink(missing_ok=True)
    environment = records.environment("cuda")
    (out / "environment.json").write_text(json.dumps(environment, indent=1))
    statuses = run_all(out)
    text = table(out, statuses, environment)
    (out / "table.txt").write_text(text)
    print(text)
    return 0 if all(found["status"] == 0 for found in statuses.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
