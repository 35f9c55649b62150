"""A kept plan launches what Triton would choose: the cases of ``direct_cases.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = (
    "routes",
    "moves",
    "joins",
    "settings",
    "another_driver",
    "one_tensor_twice",
    "nothing_is_held",
    "plans_are_bounded",
    "what_was_not_compiled",
    "whoever_replaces_run",
    "planned_each_time_plans",
    "threads",
)


@pytest.fixture(scope="module")
def failures() -> dict[str, str | None]:
    """Found in a process of its own: this one may have Triton's interpreter on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("direct_cases.py"))],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_direct(name, failures):
    assert failures[name] is None, failures[name]


def test_every_case_has_run(failures):
    assert tuple(failures) == CASES
