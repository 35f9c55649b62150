"""Uninitialised memory is poisoned in every kernel test, and launches can be counted."""

from __future__ import annotations

import pytest
import triton
from support.output_cases import poisoned


@pytest.fixture(autouse=True)
def poison():
    """torch fills every ``empty`` with NaN, or with the largest integer."""
    with poisoned():
        yield


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels launched since, in order."""
    names: list[str] = []
    kind = type(triton.jit(_nothing))
    run = kind.run

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    return names


def _nothing():
    pass
