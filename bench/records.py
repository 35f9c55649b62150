"""Where, when and of what commit something was measured: what every row of results carries."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@functools.cache
def environment(device: str) -> dict[str, object]:
    """What every row carries: device, versions, threads, commit, date."""
    found: dict[str, object] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        found |= {"driver": driver(), "cuda": torch.version.cuda}
    return found


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.*)", text)
    return found.group(1).strip() if found else platform.machine()


def slug(name: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def commit() -> str:
    """The commit's short hash, with a plus sign where the working tree differs from it.

    The variable HUBPATH_COMMIT says it of a copy of which git knows nothing, or something older.
    """
    if named := os.environ.get("HUBPATH_COMMIT"):
        return named
    try:
        found = _run("git", "rev-parse", "--short=12", "HEAD")
        changed = _run(
            "git", "status", "--porcelain", "--", "hubpath_fast", "kernels", "bench/*.py"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+" if changed else "")


@functools.cache
def driver() -> str:
    return (_asked("driver_version") or "unknown").split()[0]


@functools.cache
def gpu_name() -> str | None:
    """As torch names it, without touching CUDA; None where there is none."""
    return _asked("name")


def clocks() -> str | None:
    """Of the GPU now: its clocks, its power, and what holds them back; None where there is none."""
    return _asked("clocks.sm,clocks.mem,power.draw,clocks_event_reasons.active")


def _asked(what: str) -> str | None:
    try:
        found = _run("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.splitlines()[0].strip() if found else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
