"""The kernels as compiled for sm_90, run without a GPU: each case of ``cases.py``.

Triton either compiles or interprets, from its import on, and the other tests interpret: cases run
in a process of their own, one for each of pytest's workers.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from bench.emulated.ptx.driver import emulated

from .cases import CASES, run


class Child:
    """The process, started again should a case have killed it."""

    pool: ProcessPoolExecutor | None = None

    def call(self, function, *arguments):
        if self.pool is None:
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("TRITON_INTERPRET", raising=False)
                self.pool = ProcessPoolExecutor(
                    1, multiprocessing.get_context("spawn"), initializer=faulthandler.enable
                )
                self.pool.submit(int).result()  # it has the environment of its start
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None


@pytest.fixture(scope="session")
def child():
    child = Child()
    yield child
    child.close()


@pytest.mark.parametrize("name", CASES)
def test_compiled(name, child):
    failure = child.call(run, name)
    assert failure is None, failure


def test_a_case_that_kills_its_process_fails_alone(child):
    with pytest.raises(BrokenProcessPool):
        child.call(os._exit, 1)
    assert child.call(run, "route 48,5,2") is None


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), emulated():
        pass
