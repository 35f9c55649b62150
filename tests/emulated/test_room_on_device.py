"""The host's waits in training steps of a hub that is larger than its room, on the emulated device
(one process)."""

from __future__ import annotations

import pytest
from support.on_emulated import found_by, needs_emulated

pytestmark = needs_emulated
READS_COUNTS = {"copy to the host": 1}  # the numbers of rows, once a step
# All that goes back to the host in a step is waited for at once, however many experts leave.
LEAVING = {**READS_COUNTS, "event.synchronize": 1}


@pytest.fixture(scope="module")
def found():
    return found_by("room_on_device", kernels="torch")


@pytest.mark.parametrize("trained", ["all", "heads"])
def test_a_step_waits_once_for_all_experts_that_leave(trained, found):
    waits = found[trained]["resident"]["waits"]
    # The first two experts find the room empty. Later ones make others leave in each step, up to
    # four pieces of memory: buffers and trained parameters of two, and from the fourth step on the
    # momentum, which an update puts into memory that can travel.
    assert waits == [READS_COUNTS] + [LEAVING] * 9
    assert found[trained]["resident"]["prediction"] == LEAVING
    assert found[trained]["misses"] > 6
    assert found[trained]["sequential"]["waits"] == [READS_COUNTS] * 10


@pytest.mark.parametrize("trained", ["all", "heads"])
def test_what_left_and_came_back_has_the_values_of_experts_that_stayed(trained, found):
    assert found[trained]["equal"]
    assert found[trained]["races"] == []


def test_an_expert_that_was_on_the_device_is_in_the_hosts_memory_once_it_is_settled(found):
    assert found["all"]["settled"]


def test_memory_that_is_copied_to_the_host_may_be_freed_before_that_has_waited(found):
    sent = found["sent"]
    assert sent["before"] != [3] * 8 == sent["after"]
    assert sent["waits"] == {"event.synchronize": 1}  # none for what is there already
    assert sent["races"] == []
