"""Threads of one program on the emulated device: none waits for what another waits for (one
process)."""

from __future__ import annotations

import pytest
from support.on_emulated import found_by, needs_emulated

pytestmark = needs_emulated


@pytest.fixture(scope="module")
def found():
    return found_by("device_threads")


def test_a_thread_that_makes_streams_does_not_stop_one_that_waits_for_copies(found):
    assert found["copies_and_streams"] == list(range(found["passes"]))


def test_kernels_of_two_threads_are_launched_one_after_the_other(found):
    assert found["launches"] == [True] * 36  # three results of six routings by two threads
    assert found["races"] == []
