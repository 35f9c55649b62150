"""Python in a process of its own, where Triton compiles: here its interpreter may be on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_compiled(*arguments: str | Path, **variables: str | Path) -> str:
    """What ``python *arguments`` prints at the repository's top, which has to succeed.

    variables: of its environment.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment | variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
