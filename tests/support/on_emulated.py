"""Programs of this folder that run on the emulated device, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.emulated.device import library

ROOT = Path(__file__).parents[2]
REASON = library.what_is_missing()
needs_emulated = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def found_by(module: str, kernels: str = "interpreted") -> Any:
    """What the program ``support.<module>`` prints as JSON in its last line. kernels: as of
    ``bench.emulated``."""
    code = f"import sys; sys.path.insert(0, 'tests'); from support import {module} as p; p.main()"
    done = subprocess.run(
        [sys.executable, "-m", "bench.emulated", "--kernels", kernels, "-c", code],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
