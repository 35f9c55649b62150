"""Returns over n steps, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hubpath_fast.tasks.atari import n_step_return

REWARDS, NEVER = [1.0, 2.0, 4.0, 8.0], [False] * 4


@pytest.mark.parametrize(
    ("terminated", "truncated", "start", "n", "expected"),
    [
        (NEVER, NEVER, 0, 2, (1 + 0.5 * 2, 0.25, 2)),
        (NEVER, NEVER, 2, 2, (4 + 0.5 * 8, 0.25, 2)),  # the last that is whole
        (NEVER, NEVER, 3, 1, (8.0, 0.5, 1)),
        ([False, True, False, False], NEVER, 0, 4, (2.0, 0.0, 2)),
        (NEVER, [False, True, False, False], 0, 4, (2.0, 0.25, 2)),
        ([False, True, False, False], NEVER, 1, 3, (2.0, 0.0, 1)),
        ([False] * 3 + [True], NEVER, 1, 20, (2 + 0.5 * 4 + 0.25 * 8, 0.0, 3)),
        ([False, True, False, False], [False, True, False, False], 0, 4, (2.0, 0.0, 2)),
        ([False, True, False, False], [True, False, False, False], 0, 4, (1.0, 0.5, 1)),
        (NEVER, [False, True, False, False], 0, 2, (2.0, 0.25, 2)),  # at the n-th step itself
    ],
)
def test_n_step_return(terminated, truncated, start, n, expected):
    found = n_step_return(REWARDS, terminated, truncated, start, n, 0.5)
    assert found == expected
    assert [type(value) for value in found] == [float, float, int]
    arrays = [np.array(value) for value in (REWARDS, terminated, truncated)]
    again = n_step_return(*arrays, start, n, 0.5)
    assert again == expected
    assert [type(value) for value in again] == [float, float, int]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 2, "n": 3}, "n: expected 3 steps from step 2 on or an episode's end.* got 2"),
        ({"start": 4}, r"start: expected a stored step in 0..3, got 4"),
        ({"start": -1}, "start: expected a stored step"),
        ({"n": 0}, "n: expected at least 1 step, got 0"),
        ({"gamma": 1.5}, r"gamma: expected a number in 0..1, got 1.5"),
        ({"truncated": [False]}, "terminated, truncated: expected one flag for each of 4"),
        ({"rewards": [], "terminated": [], "truncated": []}, "start: expected a stored step"),
    ],
)
def test_n_step_return_refuses(changes, message):
    right = {"rewards": REWARDS, "terminated": NEVER, "truncated": NEVER, "start": 0, "n": 2}
    with pytest.raises(ValueError, match=message):
        n_step_return(**right | {"gamma": 0.5} | changes)
