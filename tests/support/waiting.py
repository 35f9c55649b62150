"""Waiting in tests for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

# Seconds after which a test gives up. Nothing is measured by it: on a machine with much else to do
# a process may take minutes to start, and a test that never ends says nothing.
LIMIT = 300


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Returns when the condition holds; ``what`` names it where it never does."""
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until, f"waited {LIMIT} s in vain: {what}"
        time.sleep(0.01)


def has_text(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0
