"""A kept plan launches what Triton would choose: the cases of ``direct_cases.py``."""

from __future__ import annotations

from pathlib import Path

from support.compiled import run_compiled


def test_direct_launches():
    run_compiled(Path(__file__).with_name("direct_cases.py"))
