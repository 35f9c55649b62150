"""The kernels as compiled for sm_90, run without a GPU: each case of ``cases.py``.

Triton either compiles or interprets, from its import on, and the other tests interpret: cases run
in a process of their own, one for each of pytest's workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .cases import CASES
from .driver import emulated

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """``python -m tests.emulator --serve``; started anew should a case have killed it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, name: str) -> dict:
        if self.process is None:
            self.start()
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        code = self.process.wait()
        return {"failure": f"the process died, exit status {code}:\n{self._stop()[-3000:]}"}

    def start(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in _stop)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.emulator", "--serve"],
            cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def _stop(self) -> str:
        """What it wrote to standard error."""
        self.process.communicate()
        self.process = None
        self.errors.seek(0)
        with self.errors as errors:
            return errors.read()

    def close(self) -> None:
        if self.process is not None:
            self._stop()


@pytest.fixture(scope="session")
def child():
    child = Child()
    yield child
    child.close()


@pytest.mark.parametrize("name", CASES)
def test_compiled(name, child):
    failure = child.ask(name)["failure"]
    assert failure is None, failure


def test_a_process_that_died_is_a_failure_and_started_anew():
    child = Child()
    child.start()
    child.process.kill()
    assert "the process died, exit status -9" in child.ask("route 48,5,2")["failure"]
    assert child.process is None
    child.close()


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), emulated():
        pass
